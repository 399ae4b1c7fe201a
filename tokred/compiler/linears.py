"""Linear layers as a model wrote them: whose parameters, in which orientation, with or without a LoRA branch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokred.compiler.attention import Attention
from tokred.compiler.capture import is_parameter, tensor_meta
from tokred.compiler.graphs import CONVOLUTIONS, projects
from tokred.compiler.relations import Op
from tokred.compiler.residual import residual_of

__all__ = ["Linear", "Lora", "attention_linears", "find_loras", "linear_of", "unwrapped", "wrapping"]

aten = torch.ops.aten

FLIPS = {aten.t.default, aten.transpose.int, aten.permute.default}
PASSED = {  # leave every number as it is, or round it
    aten.reshape.default,
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten._to_copy.default,
    aten.to.dtype,
}
SCALINGS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor}


@dataclass(frozen=True, eq=False)
class Linear:
    """y = x W^T + b on the last dimension, or on dimension 1 where it is a 1x1 convolution.

    weight   the parameter's node, None where the weight is computed from several or is no parameter at all
    rows     whether the parameter is [out in], as nn.Linear's; False for [in out], as GPT-2's Conv1D
    name     the parameter's name in the model, `model.layers.0.mlp.up_proj.weight`; "" without one
    channel  the dimension of x and y that the weight contracts
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    rows: bool
    name: str
    channel: int = -1


@dataclass(frozen=True, eq=False)
class Lora:
    """base(x) + s B(g * A(x)).

    join   the addition; its argument number `place` holds what base(x) became, by other branches too, the other the
           branch
    down   A, and `up` B; these may be written as `x @ weight`
    scale  s, a number
    gates  parameters whose product is g: one number each, or one for each rank (SoRA)
    """

    join: fx.Node
    place: int
    base: Linear
    down: Linear
    up: Linear
    scale: float = 1.0
    gates: tuple[fx.Node, ...] = ()


def linear_of(node: fx.Node) -> Linear | None:
    """The linear layer that a node computes, else None."""
    if not projects(node):
        return None
    op = Op(node)
    if node.target in CONVOLUTIONS:
        x, weight, bias, rows, channel = op["input"], op["weight"], op["bias"], True, 1
    elif node.target is aten.linear.default:
        x, weight, bias, rows, channel = op["input"], op["weight"], op["bias"], True, -1
    elif node.target is aten.addmm.default:
        x, weight, bias, rows, channel = op["mat1"], op["mat2"], op["self"], False, -1
        if op["beta"] != 1 or op["alpha"] != 1:
            return None
    else:
        x, weight, bias, rows, channel = op["self"], op["mat2"], None, False, -1
    if not isinstance(x, fx.Node):
        return None
    while isinstance(weight, fx.Node) and weight.target in FLIPS and len(Op(weight).shape("self")) == 2:
        weight, rows = Op(weight).operand("self"), not rows
    own = weight if is_parameter(weight) else None
    return Linear(node, x, own, bias, rows, "" if own is None else parameter_name(own), channel)


def parameter_name(node: fx.Node) -> str:
    """The name that a parameter has in the model, as far as the graph knows it."""
    return str(node.meta.get("parameter") or node.target)


def find_loras(gm: fx.GraphModule) -> dict[fx.Node, Lora]:
    """Low-rank branches beside linears that read the same input, by the addition that joins them.

    Several beside one linear are added one after the other: each has that linear as its base.
    """
    found: dict[fx.Node, Lora] = {}
    for node in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        for place in (0, 1):
            lora = _lora(node, place, found)
            if lora is not None:
                found[node] = lora
                break
    return found


def _lora(join: fx.Node, place: int, found: dict[fx.Node, Lora]) -> Lora | None:
    base, branch = join.args[place], join.args[1 - place]
    if tensor_meta(base) is None or tensor_meta(branch) is None or join.kwargs.get("alpha", 1) != 1:
        return None
    start = unwrapped(base)
    main = found[start].base if start in found else linear_of(start)
    outer, scale, gates = _unscaled(unwrapped(branch), None)
    up = _product(outer)
    if main is None or up is None:
        return None
    inner, inner_scale, inner_gates = _unscaled(unwrapped(up.input), up)
    down = _product(inner)
    if down is None or unwrapped(down.input) is not unwrapped(main.input) or not _is_low(down, main):
        return None
    return Lora(join, place, main, down, up, scale * inner_scale, (*gates, *inner_gates))


def _product(node: fx.Node) -> Linear | None:
    """A linear layer, or one that is written as `x @ weight`."""
    if node.target is not aten.matmul.default:
        return linear_of(node)
    x, weight = node.args
    rows = False
    while isinstance(weight, fx.Node) and weight.target in FLIPS and len(Op(weight).shape("self")) == 2:
        weight, rows = Op(weight).operand("self"), not rows
    meta = tensor_meta(weight)
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or meta is None:
        return None
    if not is_parameter(weight) or meta.dim() != 2:
        return None
    return Linear(node, x, weight, None, rows, parameter_name(weight))


def _unscaled(node: fx.Node, reader: Linear | None) -> tuple[fx.Node, float, list[fx.Node]]:
    """A product without its constant factors; their product; and those that are parameters.

    Parameters are of one number each, or, where a `reader` is given, of one for each number that it contracts.
    """
    scale, gates = 1.0, []
    while node.target in SCALINGS:
        left, right = node.args[:2]
        if isinstance(left, fx.Node) and isinstance(right, (int, float)) and right != 0:
            scale = scale / right if node.target is aten.div.Tensor else scale * right
            node = unwrapped(left)
            continue
        if node.target is not aten.mul.Tensor or not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            break
        values, gate = (left, right) if is_parameter(right) else (right, left)
        if not is_parameter(gate) or not _gates(gate, values, node, reader):
            break
        gates.append(gate)
        node = unwrapped(values)
    return node, scale, gates


def _gates(gate: fx.Node, values: fx.Node, product: fx.Node, reader: Linear | None) -> bool:
    sizes, before, after = (tensor_meta(node) for node in (gate, values, product))
    if sizes is None or before is None or after is None or len(before.shape) != len(after.shape):
        return False
    if sizes.numel() == 1:
        return True
    read = tensor_meta(reader.input) if reader is not None else None
    width = sizes.shape[-1]
    return read is not None and sizes.numel() == width == before.shape[-1] == read.shape[-1]


def _is_low(down: Linear, main: Linear) -> bool:
    rank, width = (linear.node.meta["val"].shape[linear.channel] for linear in (down, main))
    return isinstance(rank, int) and isinstance(width, int) and rank < width


def unwrapped(node: Any) -> Any:
    """The value behind views, copies, casts and dropout."""
    return list(wrapping(node))[-1] if isinstance(node, fx.Node) else node


def wrapping(node: fx.Node) -> Iterator[fx.Node]:
    """A value, then one by one what these are views, copies, casts or dropouts of."""
    yield node
    while node.target in PASSED and node.all_input_nodes and _is_floating(node):
        node = node.all_input_nodes[0]
        yield node


def _is_floating(node: fx.Node) -> bool:
    meta = tensor_meta(node)
    return meta is not None and meta.is_floating_point()


def attention_linears(block: Attention, loras: dict[fx.Node, Lora]) -> list[Linear]:
    """The linears right before and right behind an attention: q, k, v (or one for all), and the output's.

    Those of a branch beside another linear are no part of it.
    """
    branches = {part.node for lora in loras.values() for part in (lora.down, lora.up)}
    found = _before([block.query, block.key, block.value], branches) + _behind(block.anchor, branches)
    return sorted({linear.node: linear for linear in found}.values(), key=lambda linear: linear.node)


def _before(values: list[fx.Node], branches: set[fx.Node]) -> list[Linear]:
    """The nearest projections that values are computed from, element by element or through norms and rotations."""
    queue, seen, found = list(values), set(values), []
    while queue:
        node = queue.pop()
        linear = linear_of(node)
        if linear is not None or node in branches:
            found += [linear] if linear is not None and node not in branches else []
            continue
        if node.op != "call_function" or residual_of(node) is not None or node.target in CONTRACTIONS:
            continue
        for source in node.all_input_nodes:
            meta = tensor_meta(source)
            whole = isinstance(source.meta.get("val"), (list, tuple))  # split: its parts are read
            if source not in seen and (whole or (meta is not None and meta.is_floating_point())):
                seen.add(source)
                queue.append(source)
    return found


def _behind(anchor: fx.Node, branches: set[fx.Node]) -> list[Linear]:
    """The nearest projections that read what an attention gives."""
    queue, seen, found = [anchor], {anchor}, []
    while queue:
        for user in queue.pop().users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            linear = linear_of(user)
            if linear is not None or user in branches:
                found += [linear] if linear is not None and user not in branches else []
            elif residual_of(user) is None:
                queue.append(user)
    return found


CONTRACTIONS = {
    aten.embedding.default,
    aten.scaled_dot_product_attention.default,
    aten.softmax.int,
    *CONVOLUTIONS,
}
