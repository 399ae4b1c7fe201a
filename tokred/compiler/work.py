"""How much work a node is: FLOPs and bytes, as numbers or as sympy expressions, whatever its sizes are given as.

A FLOP is a multiplication or an addition: a multiply-add counts two. Only products count; norms and element-wise ops
are a thousandth of a transformer's arithmetic, and what they cost in time is the bytes that they move.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from tokred.backends.kernels.experts import routed_experts
from tokred.backends.kernels.learners import nested_learners
from tokred.backends.kernels.neurons import gated_tail, sparse_linear
from tokred.backends.kernels.token_sparse import expected_rows
from tokred.compiler.capture import is_parameter, tensor_meta
from tokred.compiler.relations import Op

__all__ = ["Sizes", "flops", "hint", "moved", "sizes_now", "weights"]

aten = torch.ops.aten

Sizes = Callable[[fx.Node], Sequence[Any]]  # a tensor node -> its dimensions, as numbers or expressions


def hint(size: Any) -> int:
    """A size as a number: a symbolic one is what it was when the graph was traced (1 if only the data will tell)."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 1
    return int(size)


def sizes_now(node: fx.Node) -> list[int]:
    """The dimensions of a tensor node as plain numbers."""
    meta = tensor_meta(node)
    return [] if meta is None else [hint(size) for size in meta.shape]


def flops(node: fx.Node, sizes: Sizes = sizes_now) -> Any:
    """2 x the multiply-adds of one node; 0 for everything that is not a product."""
    rule = _RULES.get(node.target)
    return 0 if rule is None else rule(Op(node), sizes)


def moved(node: fx.Node, sizes: Sizes = sizes_now) -> Any:
    """Bytes of activations that a node reads and writes, where element-wise neighbours share one kernel.

    A product reads and writes all its operands. Whatever else there is reads what a kernel before it stored, and
    stores what more than one consumer, or a product, reads. Views move nothing.
    """
    if node.op != "call_function" or _is_view(node):
        return 0
    product = node.target in _RULES
    total: Any = sum((_bytes(n, sizes) for n in _operands(node) if product or _is_stored(_base(n))), start=0)
    return total + (_bytes(node, sizes) if _is_stored(node) else 0)


def weights(node: fx.Node, sizes: Sizes = sizes_now) -> Any:
    """Bytes of the parameters that a node reads."""
    if _is_view(node):
        return 0
    read = [n for n in node.all_input_nodes if tensor_meta(n) is not None and _is_weight(n)]
    return sum((_bytes(n, sizes) for n in read), start=0)


# -- bytes ------------------------------------------------------------------------------------------------------------

_VIEWS = {
    operator.getitem,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,  # the identity, except in training
}


def _is_view(node: fx.Node) -> bool:
    return node.target in _VIEWS


def _base(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while _is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _is_weight(node: fx.Node) -> bool:
    return is_parameter(_base(node))


def _operands(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if tensor_meta(n) is not None and not _is_weight(n)]


def _is_stored(node: fx.Node) -> bool:
    """Whether a value goes through memory: inputs, products, what a product reads, what several consumers read."""
    if node.op != "call_function" or node.target in _RULES:
        return True
    consumers, queue = set(), list(node.users)
    while queue:
        user = queue.pop()
        if _is_view(user):
            queue += list(user.users)
        else:
            consumers.add(user)
    return len(consumers) != 1 or next(iter(consumers)).op == "output" or next(iter(consumers)).target in _RULES


def _bytes(node: fx.Node, sizes: Sizes) -> Any:
    meta = tensor_meta(node)
    return 0 if meta is None else _product_of(tuple(sizes(node)), meta.element_size())


@lru_cache(maxsize=4096)  # products of expressions are slow, and layers are alike
def _product_of(sizes: tuple[Any, ...], item: int) -> Any:
    return _times(sizes) * item


# -- FLOPs: one rule a product ----------------------------------------------------------------------------------------

Rule = Callable[[Op, Sizes], Any]
_RULES: dict[Any, Rule] = {}


def _counts(*targets: Any) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, function))
        return function

    return add


def _times(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


@_counts(aten.linear.default)
def _linear(op: Op, sizes: Sizes) -> Any:
    return 2 * _times(sizes(op.node)) * sizes(op.operand("weight"))[-1]  # [.. o] x [o i]


@_counts(routed_experts)
def _experts(op: Op, sizes: Sizes) -> Any:
    *pairs, out = sizes(op.node)  # [t k d]
    _, channels, both = sizes(op.operand("up"))  # [e c 2f]
    return _times(pairs) * both * (2 * channels + out)


@_counts(aten.mm.default, aten.bmm.default, aten.matmul.default, aten.mv.default, aten.dot.default)
def _product(op: Op, sizes: Sizes) -> Any:
    return 2 * _times(sizes(op.node)) * sizes(op.operand("self"))[-1]  # [.. n k] x [.. k m]


@_counts(aten.addmm.default, aten.baddbmm.default)
def _product_and_sum(op: Op, sizes: Sizes) -> Any:
    left = "mat1" if "mat1" in op.arguments else "batch1"
    return 2 * _times(sizes(op.node)) * sizes(op.operand(left))[-1]


@_counts(aten.einsum.default)
def _einsum(op: Op, sizes: Sizes) -> Any:
    """Operands are contracted from left to right; an index is summed as soon as nothing further needs it."""
    left, _, out = op["equation"].replace(" ", "").partition("->")
    terms = [_indices(term) for term in left.split(",")]
    extent = {}
    for i, term in enumerate(terms):
        shape = list(sizes(op.operand("tensors", i)))
        if "..." in term:
            place, width = term.index("..."), len(shape) - len(term) + 1
            shape[place : place + width] = [_times(shape[place : place + width])]
        extent.update(dict(zip(term, shape, strict=True)))
    total: Any = 0
    have = set(terms[0])
    for i, term in enumerate(terms[1:], 1):
        have |= set(term)
        total = total + 2 * _times([extent[index] for index in sorted(have)])
        have &= set(_indices(out)).union(*terms[i + 1 :])
    return total


def _indices(term: str) -> list[str]:
    """`"...ij"` -> ["...", "i", "j"]"""
    head, dots, tail = term.partition("...")
    return [*head, *([dots] if dots else []), *tail]


@_counts(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
def _convolution(op: Op, sizes: Sizes) -> Any:
    """Each output (transposed: each input) position times [channels/groups, kernel..]."""
    turned = bool(op.arguments.get("transposed")) or "transpose" in str(op.target)
    return 2 * _times(sizes(op.operand("input") if turned else op.node)) * _times(sizes(op.operand("weight"))[1:])


@_counts(aten.scaled_dot_product_attention.default)
def _attention(op: Op, sizes: Sizes) -> Any:
    """Both products, [* n d] x [* m d] and [* n m] x [* m e]; causal ones count the triangle that is seen."""
    query, key, value = (sizes(op.operand(name)) for name in ("query", "key", "value"))
    n, m = query[-2], key[-2]
    pairs = n * m
    if op["is_causal"]:
        long = bool(hint(op.shape("query")[-2]) > hint(op.shape("key")[-2]))  # rows past the last key see all of them
        pairs = n * m - m * (m - 1) // 2 if long else n * (n + 1) // 2
    return 2 * _times(query[:-2]) * pairs * (query[-1] + value[-1])


@_counts(sparse_linear)
def _sparse_linear(op: Op, sizes: Sizes) -> Any:
    """[* f] x [f d] of as many neurons as are expected to be active: all, where only the data tell."""
    return _expected(op, 2 * _times(sizes(op.operand("x"))) * sizes(op.operand("weight_t"))[1])


@_counts(gated_tail)
def _gated_tail(op: Op, sizes: Sizes) -> Any:
    """[* c] x [f c] and [* f] x [f d], likewise."""
    channels = sizes(op.operand("up"))[1]
    return _expected(op, 2 * _times(sizes(op.operand("act"))) * (channels + sizes(op.operand("down_t"))[1]))


def _expected(op: Op, whole: Any) -> Any:
    active = op.node.meta.get("active", 1.0)
    return int(whole * active) if isinstance(whole, int) else whole * active


@_counts(nested_learners)
def _nested_learners(op: Op, sizes: Sizes) -> Any:
    """[* c] x [n f c] and [* f] x [n f c]: all, because only the data tell how many run."""
    rows, *_ = sizes(op.operand("x"))
    return 4 * rows * _times(sizes(op.operand("up")))


@_counts(torch.ops.tokred.token_sparse_attention.default)
def _token_sparse(op: Op, sizes: Sizes) -> Any:
    """Causal attention among as many rows as are expected to attend, and the scores of the window's rows."""
    query, value = sizes(op.operand("query")), sizes(op.operand("value"))
    rows = expected_rows(query[-2], op["window"], op["least"])
    attended = rows * (rows + 1) // 2 * (query[-1] + value[-1])
    return 2 * _times(query[:-2]) * (attended + op["window"] * query[-2] * query[-1])
