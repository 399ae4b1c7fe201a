"""Routed experts, which transformers computes on rows sorted by expert, become one op whose rows are the tokens."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tokred.backends.kernels.experts import routed_experts
from tokred.compiler.capture import tensor_meta, trace_into
from tokred.compiler.graphs import as_module
from tokred.compiler.relations import Op, same

__all__ = ["fold_experts"]

aten = torch.ops.aten

PRODUCTS = {"transformers::grouped_mm_fallback", "aten::_grouped_mm"}
ACTIVATIONS = {aten.silu.default: "silu", aten.gelu.default: "gelu", aten.relu.default: "relu"}


class _Other(Exception):
    """Not what the pass looks for."""


@dataclass
class _Experts:
    """The operands of tokred::routed_experts, and `weights` [T*K] that its result is multiplied by."""

    rows: fx.Node
    experts: fx.Node  # [T*K]
    weights: fx.Node
    up: fx.Node
    down: fx.Node
    activation: str
    product: str
    choices: int


def fold_experts(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace what is sorted by expert, multiplied in groups and put back in order. Returns `gm` if there is none."""
    found: dict[fx.Node, _Experts] = {}
    for node in gm.graph.find_nodes(op="call_function", target=aten.index.Tensor):
        try:
            found[node] = _experts(node)
        except _Other:
            continue
    if not found:
        return gm
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node not in found:
            env[node] = graph.node_copy(node, env.__getitem__)
            continue
        before = set(graph.nodes)
        e = found[node]
        operands = tuple(env[n] for n in (e.rows, e.experts, e.weights, e.up, e.down))
        env[node] = trace_into(graph, _whole(e), operands)
        for made in graph.nodes:
            if made not in before:
                made.meta.update({k: node.meta[k] for k in ("stack_trace", "nn_module_stack") if k in node.meta})
    folded = as_module(gm, graph)
    graph.eliminate_dead_code()
    graph.lint()
    folded.recompile()
    return folded


def _whole(e: _Experts) -> Any:
    def compute(rows: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        out: Tensor = routed_experts(rows, experts.reshape(-1, e.choices), up, down, e.activation, e.product)  # [T K D]
        return out.reshape(-1, out.shape[-1]) * weights.unsqueeze(-1)  # [T*K D]

    return compute


def _experts(node: fx.Node) -> _Experts:
    """(grouped(act(g) * u) * weights[order])[inverse], g and u the halves of grouped(rows[order // K])."""
    weighted, inverse = _indexed(node)
    order = _inverted(inverse)
    experts = _ascending(_item(order, 1))
    out, factor = _args(weighted, aten.mul.Tensor)
    factor, last = _args(factor, aten.unsqueeze.default)
    weights, by = _indexed(factor)
    hidden, down, product, ends = _grouped(out)
    gate, value = _args(hidden, aten.mul.Tensor)
    halves = _item(_args(gate, *ACTIVATIONS)[0], 0)
    name = ACTIVATIONS[gate.target]
    sorted_rows, up, same_product, same_ends = _grouped(_halved(halves))
    rows, places = _indexed(sorted_rows)
    divided, choices = _args(places, aten.floor_divide.default)
    agrees = (
        (by, divided, _item(value, 1), same_product, same_ends) == (order, order, halves, product, ends)
        and last in (-1, 1)
        and not (len(gate.args) > 1 or gate.kwargs)  # gelu's approximation
        and _ends_of_groups(ends, order.args[0], up)
        and isinstance(choices, int)
        and all(_rank(x) == rank for x, rank in ((rows, 2), (experts, 1), (weights, 1), (up, 3), (down, 3)))
        and same(_size(rows, 0) * choices, _size(experts, 0))
    )
    if not agrees:
        raise _Other
    return _Experts(rows, experts, weights, up, down, name, product, choices)


def _args(node: Any, *targets: Any) -> Any:
    if not isinstance(node, fx.Node) or node.target not in targets:
        raise _Other
    return node.args


def _indexed(node: Any) -> tuple[Any, Any]:
    """A tensor and the indices into its first dimension alone."""
    source, indices = _args(node, aten.index.Tensor)
    if len(indices) != 1 or indices[0] is None:
        raise _Other
    return source, indices[0]


def _item(node: Any, number: int) -> fx.Node:
    """What a result of that number is taken from."""
    source, index = _args(node, operator.getitem)
    if index != number:
        raise _Other
    found: fx.Node = source
    return found


def _inverted(node: Any) -> fx.Node:
    """The permutation of which this is the inverse: empty, and at its places 0, 1, 2, ... written."""
    empty, indices, counted, *accumulate = _args(node, aten.index_put.default)
    _args(empty, aten.empty_like.default)
    if len(_args(counted, aten.arange.default)) != 1 or len(indices) != 1 or any(accumulate):
        raise _Other
    order: fx.Node = indices[0]
    if not same(_size(counted, 0), _size(order, 0)) or not same(_size(empty, 0), _size(order, 0)):
        raise _Other
    return order


def _ascending(node: Any) -> Any:
    """What is sorted along the only dimension there is, smallest first."""
    experts, *_ = _args(node, aten.sort.default)
    if _rank(experts) != 1 or any(Op(node)[name] != usual for name, usual in (("dim", -1), ("descending", False))):
        raise _Other
    return experts


def _grouped(node: Any) -> tuple[Any, Any, str, Any]:
    """What a grouped product multiplies, its matrices, its name, and where its groups end."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        raise _Other
    name = node.target._schema.name
    if name not in PRODUCTS:
        raise _Other
    arguments = list(Op(node).arguments.values())
    if any(extra is not None for extra in arguments[3:]):  # a bias, another dtype
        raise _Other
    return arguments[0], arguments[1], name, arguments[2]


def _halved(node: Any) -> Any:
    """What is split in two along its last dimension."""
    source, size, *dim = _args(node, aten.split.Tensor)
    if dim not in ([-1], [1]) or not same(2 * size, _size(source, 1)):
        raise _Other
    return source


def _ends_of_groups(ends: Any, sort: Any, up: Any) -> bool:
    """Whether groups end where the sorted experts change: the running sum of how many rows each of them has."""
    histogram, dim = _args(ends, aten.cumsum.default)[:2]
    values, bins, low, high = _args(histogram, aten.histc.default)
    sources = _args(values, aten._to_copy.default, aten.to.dtype)
    count = _size(up, 0)
    return bool(dim == 0 and _item(sources[0], 0) is sort and (bins, low, high) == (count, 0, count - 1))


def _rank(node: Any) -> int:
    meta = tensor_meta(node)
    return -1 if meta is None else meta.dim()


def _size(node: Any, dim: int) -> Any:
    meta = tensor_meta(node)
    if meta is None or meta.dim() <= dim:
        raise _Other
    return meta.shape[dim]
