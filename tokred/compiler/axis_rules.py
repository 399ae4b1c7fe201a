"""The op rules: for each ATen op, which dimensions of its inputs and outputs run over the same index.

Adding a rule is the normal way to support a new model: a few lines here, and its equation as the comment. An op without
a rule is opaque: tokens are restored before it, and the report says so.
"""

from __future__ import annotations

from dataclasses import replace
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
    same,
)

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
    return [replace(link, kind=Kind.ATTEND) if link.ins[0] == Slot("key", 0, rank - 2) else link for link in links]


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


@rule(aten.transpose.int, aten.swapaxes.default)
def transpose(op: Op) -> Flow:
    rank = len(op.shape("self"))
    i, j = op.number("dim0") % rank, op.number("dim1") % rank
    return each(op, {d: {i: j, j: i}.get(d, d) for d in range(rank)})  # [.. a .. b ..] -> [.. b .. a ..]


@rule(aten.t.default, aten.mT.default)
def t(op: Op) -> Flow:
    rank = len(op.shape("self"))
    return each(
        op, {d: d for d in range(rank - 2)} | ({rank - 2: rank - 1, rank - 1: rank - 2} if rank > 1 else {0: 0})
    )


@rule(aten.permute.default)
def permute(op: Op) -> Flow:
    rank = len(op.shape("self"))
    return each(op, {int(d) % rank: o for o, d in enumerate(op["dims"])})


@rule(aten.unsqueeze.default)
def unsqueeze(op: Op) -> Flow:
    rank = len(op.shape("self"))
    place = op.number("dim") % (rank + 1)
    return each(op, {i: i + (i >= place) for i in range(rank)})  # [a b] -> [a 1 b]


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(op: Op) -> Flow:
    shape = op.shape("self")
    dims: Any = op.arguments.get("dim", range(len(shape)))
    dims = [dims] if isinstance(dims, int) else dims
    gone = {d % len(shape) for d in dims if same(shape[d], 1)}
    kept = [i for i in range(len(shape)) if i not in gone]
    return each(op, {i: o for o, i in enumerate(kept)})  # [a 1 b] -> [a b]


@rule(aten.expand.default, aten.broadcast_to.default, aten.expand_as.default)
def expand(op: Op) -> Flow:
    return [*einlinks(op, {"self": "*"}, "*")]  # [1|a ..] -> [b .. a ..]


@rule(aten.repeat.default)
def repeat(op: Op) -> Flow:
    shape, out = op.shape("self"), op.out_shape()
    lead = len(out) - len(shape)
    return each(op, {i: i + lead for i in range(len(shape)) if same(shape[i], out[i + lead])})


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(op: Op) -> Flow:
    if op.arguments.get("dim") is None:
        return []
    return each(op, {i: i for i in range(len(op.shape("self"))) if i != op.dim()})


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int)
def view(op: Op) -> Flow:
    return [Reshape("self")]  # the common refinement of both shapes: [B*N C] -> [B N H D]


@rule(aten.slice.Tensor)
def slice_(op: Op) -> Flow:
    shape, along = op.shape("self"), op.dim()
    links: Relations = [*each(op, {i: i for i in range(len(shape)) if i != along})]
    start, stop = _bounds(op, shape[along])
    if same(op.number("step"), 1):
        links.append(_window(Slot("self", 0, along), start, stop, (0, along), shape[along]))
    return links


def _bounds(op: Op, size: Any) -> tuple[Any, Any]:
    start, stop = op.number("start"), op.number("end")
    start = 0 if start is None else start
    stop = size if stop is None else stop
    if isinstance(start, int) and start < 0:
        start = start + size
    if isinstance(stop, int) and stop < 0:
        stop = stop + size
    if isinstance(stop, int) and (stop >= 2**62 or (isinstance(size, int) and stop > size)):
        stop = size
    if isinstance(size, int) and isinstance(start, int) and isinstance(stop, int):
        start, stop = min(max(start, 0), size), max(stop, 0)
    return start, stop


def _window(source: Slot, start: Any, stop: Any, out: tuple[int, int], size: Any) -> Link | Window:
    if same(start, 0) and same(stop, size):
        return Link(Kind.EACH, (source,), (out,))
    return Window(source, start, stop, out)


@rule(aten.select.int)
def select(op: Op) -> Flow:
    shape, along = op.shape("self"), op.dim()
    index = op.number("index")
    if isinstance(index, int) and index < 0:
        index = index + shape[along]
    links: Relations = [*each(op, {i: i - (i > along) for i in range(len(shape)) if i != along})]
    return [*links, Window(Slot("self", 0, along), index, index + 1, None)]


@rule(aten.unbind.int)
def unbind(op: Op) -> Flow:
    shape, along = op.shape("self"), op.dim()
    links: Relations = []
    for r in range(len(op.results)):
        links += each(op, {i: i - (i > along) for i in range(len(shape)) if i != along}, result=r)
        links.append(Window(Slot("self", 0, along), r, r + 1, None))
    return links


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes)
def split(op: Op) -> Flow:
    shape, along = op.shape("self"), op.dim()
    links: Relations = []
    start: Any = 0
    for r in range(len(op.results)):
        stop = start + op.out_shape(r)[along]
        links += each(op, {i: i for i in range(len(shape)) if i != along}, result=r)
        links.append(_window(Slot("self", 0, along), start, stop, (r, along), shape[along]))
        start = stop
    return links


@rule(aten.cat.default)
def cat(op: Op) -> Flow:
    rank = len(op.out_shape())
    along = int(op.number("dim")) % rank
    parts = [(i, node) for _, i, node in op.tensors() if node.meta["val"].dim() == rank]  # an empty cache is rank one
    links: Relations = [
        Link(Kind.EACH, tuple(Slot("tensors", i, d) for i, _ in parts), ((0, d),)) for d in range(rank) if d != along
    ]
    return [*links, Join(tuple(Slot("tensors", i, along) for i, _ in parts), (0, along))]


@rule(aten.stack.default)
def stack(op: Op) -> Flow:
    rank = len(op.out_shape())
    place = int(op.number("dim")) % rank
    count = len(op["tensors"])
    return [
        Link(Kind.EACH, tuple(Slot("tensors", i, d) for i in range(count)), ((0, d + (d >= place)),))
        for d in range(rank - 1)
    ]


@rule(aten.embedding.default)
def embedding(op: Op) -> Flow:
    rank = len(op.shape("indices"))
    return [*each(op, {i: i for i in range(rank)}, "indices"), *each(op, {1: rank}, "weight")]  # [v c] [*] -> [* c]


@rule(aten.gather.default)
def gather(op: Op) -> Flow:
    along, rank = op.dim(), len(op.shape("self"))
    links: Relations = []
    for d in range(rank):
        slots = (Slot("index", 0, d),) if d == along else (Slot("self", 0, d), Slot("index", 0, d))
        if d == along or same(op.shape("self")[d], op.shape("index")[d]):
            links.append(Link(Kind.EACH, slots, ((0, d),)))
    return links


@rule(aten.index_select.default)
def index_select(op: Op) -> Flow:
    along = op.dim()
    links: Relations = [*each(op, {i: i for i in range(len(op.shape("self"))) if i != along})]
    return [*links, *each(op, {0: along}, "index")]


@rule(
    aten.masked_scatter.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.scatter.value,
    aten.scatter.src,
)
def scatter(op: Op) -> Flow:
    along = op.dim() if "dim" in op.arguments else None
    rank = len(op.shape("self"))
    if along is None:
        return []
    links: Relations = []
    for d in range(rank):
        if d == along:
            continue
        others = [Slot("self", 0, d)]
        if "src" in op.arguments and op.target is not aten.scatter.src:
            source = d - (op.target is aten.select_scatter.default and d > along)
            others.append(Slot("src", 0, source))
        links.append(Link(Kind.EACH, tuple(others), ((0, d),)))
    return links


@rule(aten.index.Tensor)
def index(op: Op) -> Flow:
    # x[:, i] with one 1-D index keeps the other dimensions; anything else is left to be mixed
    indices = op["indices"]
    used = [d for d, item in enumerate(indices) if item is not None]
    if len(used) != 1 or len(op.shape("indices", used[0])) != 1:
        return []
    links: Relations = [*each(op, {i: i for i in range(len(op.shape("self"))) if i != used[0]})]
    return links


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


def refine(sizes: list[Any], shape: tuple[Any, ...], loose: list[bool]) -> list[list[tuple[int, Any]]] | None:
    """Split a row-major list of factors among the dimensions of `shape`; None where a factor that is not loose is cut.

    Returns for each dimension the (factor, size) pairs it is made of, outermost first. Loose factors of size one are
    dropped; others of size one go to the first dimension that can hold them.
    """
    queue = [(i, size) for i, size in enumerate(sizes) if not (loose[i] and same(size, 1))]
    dims: list[list[tuple[int, Any]]] = []
    for need in shape:
        taken: list[tuple[int, Any]] = []
        if same(need, 1) and queue and same(queue[0][1], 1):
            taken.append(queue.pop(0))
        while not same(need, 1):
            if not queue:
                return None
            factor, size = queue.pop(0)
            if same(need, size):
                taken.append((factor, size))
                need = 1
            elif _divides(size, need):
                taken.append((factor, size))
                need = need // size
            elif loose[factor] and _divides(need, size):
                taken.append((factor, need))
                queue.insert(0, (factor, size // need))
                need = 1
            else:
                return None
        dims.append(taken)
    return dims if all(same(size, 1) for _, size in queue) else None


def _divides(small: Any, large: Any) -> bool:
    return same(large % small, 0)


__all__ = ["refine"]
