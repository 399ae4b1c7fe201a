"""MLP blocks: a linear fed through an activation from another linear, on rows of a known token axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokred.backends.kernels.experts import routed_experts
from tokred.compiler.attention import Attention
from tokred.compiler.axes import Axes
from tokred.compiler.capture import is_parameter, module_path, source_line, tensor_meta
from tokred.compiler.graphs import CONVOLUTIONS, PRODUCTS, projects, reaches, times
from tokred.compiler.relations import Op
from tokred.compiler.residual import residual_of

__all__ = ["Mlp", "find_mlps"]

aten = torch.ops.aten

ACTIVATIONS = {
    aten.gelu.default,
    aten.relu.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.hardswish.default,
    aten.leaky_relu.default,
    aten.elu.default,
    aten.mish.default,
    aten.softplus.default,
    aten.glu.default,
    aten.erf.default,
}
SPLITS = {aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default, aten.slice.Tensor, aten.unbind.int}


@dataclass(eq=False)
class Mlp:
    """One MLP: its last linear, and the first ones."""

    down: fx.Node
    ups: list[fx.Node]
    form: str  # plain, gated, packed, routed (one op holds all of it)
    layer: int = 0
    module: str = ""
    source: str = ""
    tokens: Any = 0
    token_dims: tuple[int, ...] = ()
    axis: tuple[int, ...] = ()


def find_mlps(gm: fx.GraphModule, axes: Axes, attentions: list[Attention]) -> list[Mlp]:
    """All MLP blocks of a captured graph, in the order in which they run; layers count from 0 on each token axis."""
    mlps = [mlp for node in gm.graph.nodes if (mlp := _mlp(node, axes, attentions)) is not None]
    counts: dict[tuple[int, ...], int] = {}
    for mlp in mlps:
        mlp.layer = counts.get(mlp.axis, 0)
        counts[mlp.axis] = mlp.layer + 1
    return mlps


def _mlp(node: fx.Node, axes: Axes, attentions: list[Attention]) -> Mlp | None:
    """A projection whose input comes, through an activation and element-wise ops only, from one or two projections; or
    routed experts."""
    routed = node.target is routed_experts
    if not (routed or projects(node)) or not axes.knows(node):
        return None
    ups, activated, packed = ([node], True, False) if routed else _frontier(node, attentions)
    if not activated or not 1 <= len(ups) <= 2:
        return None
    dims = axes.of(node)
    channel = 1 if node.target in CONVOLUTIONS else len(dims) - 1
    atoms = [id(atom) for d, dim in enumerate(dims) if d != channel for atom in dim]
    token_classes = {block.axis for block in attentions if block.axis}
    axis = next((a for a in token_classes if all(atom in atoms for atom in a)), None)
    if axis is None and not _adds_to_stream(node, attentions):
        return None  # a modulation or an embedding of the time step: the same shape of graph, but on no stream
    axis = axis or ()
    rest = tuple(d for d, dim in enumerate(dims) if d != channel and any(id(atom) in axis for atom in dim))
    tokens = times([atom.size for d in rest for atom in dims[d] if id(atom) in axis]) if axis else _rows(node, channel)
    form = "routed" if routed else "gated" if len(ups) == 2 else "packed" if packed else "plain"
    return Mlp(node, ups, form, 0, module_path(node), source_line(node), tokens, rest, axis)


def _adds_to_stream(node: fx.Node, attentions: list[Attention]) -> bool:
    """Whether the output ends in a residual join behind an attention."""
    queue, seen = list(node.users), set()
    while queue:
        user = queue.pop()
        if user in seen or user.op != "call_function" or projects(user):
            continue
        seen.add(user)
        stream = residual_of(user)
        if stream is not None:
            return reaches(stream, node) and any(block.anchor < node for block in attentions)
        queue += list(user.users)
    return False


def _rows(node: fx.Node, channel: int) -> Any:
    meta = tensor_meta(node)
    assert meta is not None
    return times([size for d, size in enumerate(meta.shape) if d not in (0, channel)])


def _frontier(node: fx.Node, attentions: list[Attention]) -> tuple[list[fx.Node], bool, bool]:
    """The linears behind an element-wise region, whether it holds an activation, whether it multiplies two branches."""
    anchors = {block.anchor for block in attentions}
    op = Op(node)
    start = op.arguments.get("input", op.arguments.get("mat1", op.arguments.get("self")))
    queue, seen = [start], set()
    ups: list[fx.Node] = []
    activated = product = False
    while queue:
        current = queue.pop()
        if not isinstance(current, fx.Node) or current in seen or is_parameter(current):
            continue
        seen.add(current)
        if projects(current):
            ups.append(current)
            continue
        if current.target in CONVOLUTIONS and Op(current)["groups"] == 1:
            return [], False, False  # a convolution over several places is a layer of its own
        if (
            current in anchors
            or current.target in PRODUCTS
            or residual_of(current) is not None
            or current.op == "placeholder"
        ):
            return [], False, False
        activated |= current.target in ACTIVATIONS
        product |= (
            current.target is aten.mul.Tensor and len([n for n in current.all_input_nodes if not is_parameter(n)]) == 2
        )
        queue += [
            n
            for n in current.all_input_nodes
            if tensor_meta(n) is not None or isinstance(n.meta.get("val"), (list, tuple))
        ]
    packed = product and len(ups) == 1 and any(n.target in SPLITS for n in seen if isinstance(n, fx.Node))
    return ups, activated, packed
