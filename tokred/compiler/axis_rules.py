"""The op rules: for each ATen op, which dimensions of its inputs and outputs run over the same index.

Adding a rule is the normal way to support a new model: a few lines here, and its equation as the comment. An op without
a rule is opaque: tokens are restored before it, and the report says so. Ops that only move numbers: axis_moves.py.
"""

from __future__ import annotations

from typing import Any

import torch

from tokred.backends.kernels.experts import routed_experts
from tokred.compiler.relations import (
    Flow,
    Join,
    Kind,
    Link,
    Op,
    Reshape,
    Slot,
    Window,
    each,
    einlinks,
    pointwise,
    rule,
)

__all__ = ["Relations"]

aten = torch.ops.aten

Relations = list[Link | Window | Join | Reshape]

rule(
    aten.dropout.default,
    aten.native_dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten._to_copy.default,
    aten.to,
    aten.type_as.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.copy.default,
    aten.where,
    aten.__and__,
    aten.__or__,
    aten.hardswish.default,
    aten._conj.default,
    aten.resolve_conj.default,
    aten.bernoulli,
)(pointwise)  # [..] -> [..]


@rule(aten.linear.default)
def linear(op: Op) -> Flow:
    return [*einlinks(op, {"input": "* i", "weight": "o i", "bias": "o"}, "* o")]  # [* i] [o i] [o] -> [* o]


@rule(routed_experts)
def experts(op: Op) -> Flow:
    ins = {"rows": "t c", "experts": "t k", "up": "e c f", "down": "e g d"}  # each row by its own experts
    return [*einlinks(op, ins, "t k d")]  # [t c] [t k] [e c f] [e g d] -> [t k d]


@rule(aten.matmul.default)
def matmul(op: Op) -> Flow:
    a, b = len(op.shape("self")), len(op.shape("other"))
    left = "k" if a == 1 else "* n k"
    right = "k" if b == 1 else "* k m"
    out = " ".join(["*"] * (max(a, b) > 2) + ["n"] * (a > 1) + ["m"] * (b > 1))
    return [
        *einlinks(
            op,
            {"self": left if a > 2 else left.replace("* ", ""), "other": right if b > 2 else right.replace("* ", "")},
            out,
        )
    ]


@rule(aten.bmm.default)
def bmm(op: Op) -> Flow:
    return [*einlinks(op, {"self": "b n k", "mat2": "b k m"}, "b n m")]  # [b n k] [b k m] -> [b n m]


@rule(aten.mm.default)
def mm(op: Op) -> Flow:
    return [*einlinks(op, {"self": "n k", "mat2": "k m"}, "n m")]  # [n k] [k m] -> [n m]


@rule(aten.addmm.default)
def addmm(op: Op) -> Flow:
    return [*einlinks(op, {"self": "n m", "mat1": "n k", "mat2": "k m"}, "n m")]  # [n m] + [n k] [k m] -> [n m]


@rule(aten.baddbmm.default)
def baddbmm(op: Op) -> Flow:
    return [*einlinks(op, {"self": "b n m", "batch1": "b n k", "batch2": "b k m"}, "b n m")]


@rule(aten.scaled_dot_product_attention.default)
def attention(op: Op) -> Flow:
    # [* n d] [* m d] [* m e] mask [* n m] -> [* n e]; with enable_gqa the head dims of k and v are not those of q
    rank = len(op.shape("key"))
    ins = {"query": "* n d", "key": "* m d", "value": "* m e", "attn_mask": "* n m"}
    links = einlinks(op, ins, "* n e")
    return [link._replace(kind=Kind.ATTEND) if link.ins[0] == Slot("key", 0, rank - 2) else link for link in links]


@rule(aten.einsum.default)
def einsum(op: Op) -> Flow:
    left, _, right = str(op["equation"]).replace(" ", "").partition("->")
    if "." in left or not right:
        return []
    letters: dict[str, list[Slot]] = {}
    for index, spec in enumerate(left.split(",")):
        for dim, letter in enumerate(spec):
            letters.setdefault(letter, []).append(Slot("tensors", index, dim))
    return [
        Link(Kind.EACH, tuple(slots), ((0, right.index(letter)),))
        if letter in right
        else Link(Kind.CONTRACT, tuple(slots))
        for letter, slots in letters.items()
    ]


@rule(aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default, aten._fused_rms_norm.default)
def norm_over_trailing(op: Op) -> Flow:
    rank = len(op.shape("input"))
    return each(op, {i: i for i in range(rank - len(op["normalized_shape"]))}, "input")  # [* c] -> [* c], c mixed


@rule(aten.group_norm.default, aten.native_group_norm.default)
def group_norm(op: Op) -> Flow:
    return each(op, {0: 0}, "input")  # [b c ..] -> [b c ..], all but b mixed


@rule(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)
def batch_norm(op: Op) -> Flow:
    rank = len(op.shape("input"))
    if op.arguments.get("training", False):
        return each(op, {1: 1}, "input")  # statistics run over everything but the channel
    return each(op, {i: i for i in range(rank)}, "input")  # [b c ..] -> [b c ..]


@rule(
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default, aten._safe_softmax.default
)
def softmax(op: Op) -> Flow:
    along = op.dim()
    links = each(op, {i: i for i in range(len(op.shape("self"))) if i != along})
    return [*links, Link(Kind.SOFTMAX, (Slot("self", 0, along),), ((0, along),))]


def _reduction(kind: Kind) -> Any:
    def reduction(op: Op) -> Flow:
        rank = len(op.shape("self"))
        given: Any = op.arguments.get("dim")
        dims = range(rank) if given is None or given == [] else [given] if isinstance(given, int) else given
        reduced = {int(d) % max(rank, 1) for d in dims}
        keep = bool(op.arguments.get("keepdim", False))
        links: Relations = []
        place = 0
        for i in range(rank):
            if i in reduced:
                links.append(Link(kind, (Slot("self", 0, i),)))
                place += keep
            else:
                links += each(op, {i: place})
                place += 1
        return links

    return reduction


rule(aten.mean.dim, aten.mean.default)(_reduction(Kind.MEAN))
rule(aten.sum.dim_IntList, aten.sum.default)(_reduction(Kind.SUM))
rule(aten.amax.default, aten.amin.default, aten.any.dim, aten.any.dims, aten.all.dim)(_reduction(Kind.MAX))


@rule(
    aten.max.dim,
    aten.min.dim,
    aten.argmax.default,
    aten.argmin.default,
    aten.topk.default,
    aten.sort.default,
    aten.argsort.default,
)
def along_one_dim(op: Op) -> Flow:
    if op.arguments.get("dim") is None:
        return []
    along, rank = op.dim(), len(op.shape("self"))
    drops = len(op.out_shape()) < rank
    links: Relations = []
    for result in range(len(op.results)):
        links += each(op, {i: i - (drops and i > along) for i in range(rank) if i != along}, result=result)
    return links


@rule(aten.cumsum.default, aten.cumprod.default, aten.flip.default, aten.roll.default, aten.glu.default)
def mixes_some_dims(op: Op) -> Flow:
    dims: Any = op.arguments.get("dims", op.arguments.get("dim"))
    mixed = {int(d) % len(op.shape("self")) for d in ([dims] if isinstance(dims, int) else dims)}
    return each(op, {i: i for i in range(len(op.shape("self"))) if i not in mixed})


@rule(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.var.correction, aten.var.dim, aten.std.correction)
def mixing_reduction(op: Op) -> Flow:
    flow = _reduction(Kind.SUM)(op)
    return [link for link in flow if link.kind is Kind.EACH]


@rule(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.convolution.default,
    aten.avg_pool2d.default,
    aten.max_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool1d.default,
    aten.upsample_bilinear2d,
    aten.upsample_nearest2d,
    aten.upsample_bicubic2d,
)
def batch_only(op: Op) -> Flow:
    return each(op, {0: 0}, "input" if "input" in op.arguments else "self")  # [b ..] -> [b ..]
