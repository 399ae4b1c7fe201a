"""MLP blocks: a linear fed through an activation from another linear, on rows of a known token axis.

Whatever the spelling (two linears or one for gate and up, Conv1D, 1x1 convolutions, a LoRA branch beside each), a block
knows its linears with their parameters, which value holds its neurons, and which one gates them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokred.backends.kernels.experts import routed_experts
from tokred.compiler.attention import Attention
from tokred.compiler.axes import Axes
from tokred.compiler.capture import is_parameter, module_path, source_line, tensor_meta
from tokred.compiler.graphs import CONVOLUTIONS, PRODUCTS, projects, reaches, times
from tokred.compiler.linears import Linear, Lora, find_loras, linear_of, unwrapped
from tokred.compiler.relations import Op
from tokred.compiler.residual import residual_of

__all__ = ["Gating", "Mlp", "Part", "find_mlps"]

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


@dataclass(frozen=True, eq=False)
class Part:
    """What a linear gives, or with `start` and `stop` these of its output channels. `node` is that value."""

    node: fx.Node
    linear: fx.Node  # or the addition that joins a LoRA branch to it
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, eq=False)
class Gating:
    """product = activated * up: `activated` is computed element by element from `gate`."""

    product: fx.Node
    activated: fx.Node
    gate: Part
    up: Part


@dataclass(eq=False)
class Mlp:
    """One MLP: its last linear, and the first ones (or what joins a LoRA branch to them)."""

    down: fx.Node
    ups: list[fx.Node]
    form: str  # plain, gated, packed, routed (one op holds all of it)
    layer: int = 0
    module: str = ""
    source: str = ""
    tokens: Any = 0
    token_dims: tuple[int, ...] = ()
    axis: tuple[int, ...] = ()
    gating: Gating | None = None  # of gated and packed forms
    products: tuple[fx.Node, ...] = ()  # every product of the block, those of LoRA branches too
    outputs: tuple[Linear, ...] = ()  # the last linear, if its weight can be read off
    inputs: tuple[Linear, ...] = ()  # the first ones
    depth: int = 1  # of how many layers it is one


def find_mlps(gm: fx.GraphModule, axes: Axes, attentions: list[Attention]) -> list[Mlp]:
    """All MLP blocks of a captured graph, in the order in which they run; layers count from 0 on each token axis."""
    loras = find_loras(gm)
    mlps = [mlp for node in gm.graph.nodes if (mlp := _mlp(node, axes, attentions, loras)) is not None]
    counts: dict[tuple[int, ...], int] = {}
    for mlp in mlps:
        mlp.layer = counts.get(mlp.axis, 0)
        counts[mlp.axis] = mlp.layer + 1
    for mlp in mlps:
        mlp.depth = counts[mlp.axis]
    return mlps


def _mlp(node: fx.Node, axes: Axes, attentions: list[Attention], loras: Mapping[fx.Node, Lora]) -> Mlp | None:
    """A projection whose input comes, through an activation and element-wise ops only, from one or two projections; or
    routed experts."""
    routed = node.target is routed_experts
    if not (routed or projects(node)) or not axes.knows(node) or any(node in _branch(lora) for lora in loras.values()):
        return None
    ups, activated, packed = ([node], True, False) if routed else _frontier(node, attentions, loras)
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
    mlp = Mlp(node, ups, form, 0, module_path(node), source_line(node), tokens, rest, axis)
    if routed:
        mlp.products = (node,)
    else:
        _name_parts(mlp, loras)
    return mlp


def _branch(lora: Lora) -> tuple[fx.Node, fx.Node]:
    return lora.down.node, lora.up.node


def _name_parts(mlp: Mlp, loras: Mapping[fx.Node, Lora]) -> None:
    """Which linears the block has, and, where two branches are multiplied, which one gates the other."""
    bases = [loras[up].base.node if up in loras else up for up in mlp.ups]
    beside = [lora for lora in loras.values() if lora.base.node in (*bases, mlp.down)]
    mlp.products = (*bases, mlp.down, *(node for lora in beside for node in _branch(lora)))
    mlp.inputs = tuple(linear for node in bases if (linear := linear_of(node)) is not None)
    mlp.outputs = tuple(linear for node in (mlp.down,) if (linear := linear_of(node)) is not None)
    if mlp.outputs and mlp.form != "plain":
        mlp.gating = _gating(mlp)


def _gating(mlp: Mlp) -> Gating | None:
    """None where the value that the last linear reads is no product of an activated and of a plain branch."""
    product = unwrapped(mlp.outputs[0].input)
    if product.target is not aten.mul.Tensor:
        return None
    channel = mlp.outputs[0].channel
    for activated, other in (product.args, product.args[::-1]):
        up = _part(other, mlp.ups, channel)
        gates = _gate_parts(activated, mlp.ups, channel)
        if up is not None and len(gates) == 1:
            gate = gates[0]
            if gate.linear is not up.linear or (gate.start, gate.stop) != (up.start, up.stop):
                return Gating(product, activated, gate, up)
    return None


def _part(value: Any, ups: list[fx.Node], channel: int) -> Part | None:
    """The value as a linear's output, or as a half of it, behind views and casts alone; else None."""
    node = value
    while isinstance(node, fx.Node):
        if node in ups:
            return Part(node, node)
        cut = _cut(node, channel)
        if cut is not None:
            source, start, stop = cut
            source = unwrapped(source) if source not in ups else source
            return Part(node, source, start, stop) if source in ups else None
        inner = unwrapped(node)
        if inner is node:
            return None
        node = node.all_input_nodes[0]
    return None


def _cut(node: fx.Node, channel: int) -> tuple[fx.Node, int, int] | None:
    """(source, first, behind the last) where a node is a run of its source's channels."""
    whole = node.args[0] if node.target is operator.getitem else node
    if not isinstance(whole, fx.Node) or whole.target not in SPLITS or whole.target is aten.unbind.int:
        return None
    op = Op(whole)
    source = op.operand("self")
    rank = len(op.shape("self"))
    sizes = op.shape("self")[op.dim()], tensor_meta(node)
    if op.dim() != channel % rank or not isinstance(sizes[0], int) or sizes[1] is None:
        return None
    total, length = sizes[0], sizes[1].shape[channel]
    if node.target is aten.slice.Tensor:
        start, step = op.arguments.get("start") or 0, op.arguments.get("step", 1)
        if step != 1 or not isinstance(start, int):
            return None
        return source, start % total if start < 0 else start, (start % total if start < 0 else start) + length
    before = whole.meta["val"][: node.args[1]]
    start = sum(part.shape[channel] for part in before)
    return source, start, start + length


def _gate_parts(value: Any, ups: list[fx.Node], channel: int) -> list[Part]:
    """The parts of linears from which a value with an activation in it is computed; none if there is no activation."""
    queue, seen, activated = [value], set(), False
    parts: dict[fx.Node, Part] = {}
    while queue:
        node = queue.pop()
        if not isinstance(node, fx.Node) or node in seen or is_parameter(node):
            continue
        seen.add(node)
        part = _part(node, ups, channel) if node in ups or _cut(node, channel) is not None else None
        if part is not None:
            parts[part.node] = part
            continue
        activated |= node.target in ACTIVATIONS
        queue += node.all_input_nodes
    return list(parts.values()) if activated else []


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


def _frontier(
    node: fx.Node, attentions: list[Attention], loras: Mapping[fx.Node, Lora]
) -> tuple[list[fx.Node], bool, bool]:
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
        if projects(current) or current in loras:
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
