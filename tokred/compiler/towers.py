"""Vision towers: the encoder behind the features that a language model reads as image tokens, if each of its patches
became one of them, in order."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokred.compiler.attention import Attention
from tokred.compiler.capture import is_parameter, tensor_meta
from tokred.compiler.graphs import reaches
from tokred.compiler.relations import Op, same
from tokred.compiler.residual import residual_of

__all__ = ["Tower", "find_tower"]

aten = torch.ops.aten

# What keeps rows of channels, and their order, if the last dimension stays what it is.
COPIES = {aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.dim}
COPIES |= {
    aten.slice.Tensor,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
}
# What computes each row from itself and parameters alone.
ROWWISE = {aten.linear.default, aten.layer_norm.default, aten.rms_norm.default, aten._to_copy.default}
ROWWISE |= {aten.gelu.default, aten.relu.default, aten.silu.default, aten.tanh.default, aten.dropout.default}
PARTS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}


@dataclass(frozen=True)
class Tower:
    """A vision encoder.

    attention  its last self-attention block before the features were taken
    stream     [I T C] what was taken from it, for I images; the last T - `first` rows of each became image tokens
    first      how many rows in front are left out; if there are any, row 0 is the class token
    projector  the ops, in order, that turned each such row into an image token, from that row and parameters alone
    """

    attention: Attention
    stream: fx.Node
    first: int
    projector: tuple[fx.Node, ...]


def find_tower(features: fx.Node, attentions: list[Attention]) -> Tower | None:
    """The tower that made these rows (the source of a masked_scatter); None where it does not show."""
    node, first, projector = features, 0, []
    while residual_of(node) is None:
        if node.op != "call_function" or not node.args:
            return None  # the features come from another graph
        source: Any = _whole(node) if node.target in (aten.cat.default, aten.stack.default) else node.args[0]
        if not isinstance(source, fx.Node) or tensor_meta(source) is None or tensor_meta(node) is None:
            return None
        if node.target is aten.slice.Tensor and not _is_whole(node, source):
            shape, (start, stop) = tensor_meta(source).shape, _bounds(node)  # type: ignore[union-attr]
            if (
                first
                or len(shape) != 3
                or (Op(node)["dim"], Op(node)["step"]) != (1, 1)
                or stop < shape[1]
                or start < 0
            ):
                return None
            first = start
        elif node.target in ROWWISE and _is_rowwise(node):
            projector.append(node)
        elif node.target not in (aten.cat.default, aten.stack.default) and not _copies(node, source):
            return None
        node = source
    shape = tensor_meta(node).shape  # type: ignore[union-attr]
    behind = [b for b in attentions if b.join is not None and (b.join is node or reaches(b.join, node))]
    if len(shape) != 3 or not behind or behind[-1].masks or behind[-1].causal or behind[-1].form != "self":
        return None
    fits = behind[-1].batch_dim == 0 and behind[-1].token_dim == 1 and same(behind[-1].tokens, shape[1])
    return Tower(behind[-1], node, first, tuple(reversed(projector))) if fits else None


def _copies(node: fx.Node, source: fx.Node) -> bool:
    before, after = tensor_meta(source), tensor_meta(node)
    assert before is not None and after is not None
    return node.target in COPIES and after.dim() >= 2 and same(before.shape[-1], after.shape[-1])


def _is_whole(node: fx.Node, source: fx.Node) -> bool:
    before, after = tensor_meta(source), tensor_meta(node)
    assert before is not None and after is not None
    return all(same(a, b) for a, b in zip(before.shape, after.shape, strict=True))


def _is_rowwise(node: fx.Node) -> bool:
    tensors = [arg for arg in node.all_input_nodes if tensor_meta(arg) is not None]
    normalised = node.args[1] if node.target in (aten.layer_norm.default, aten.rms_norm.default) else [0]
    return all(is_parameter(arg) for arg in tensors[1:]) and len(normalised) == 1  # type: ignore[arg-type]


def _bounds(node: fx.Node) -> tuple[Any, Any]:
    op = Op(node)
    start, stop = op["start"] or 0, op["end"]
    return start, 2**62 if stop is None else stop


def _whole(node: fx.Node) -> fx.Node | None:
    """The tensor whose parts along the first dimension are all concatenated again, in order."""
    parts: Any = node.args[0]
    if Op(node)["dim"] != 0:
        return None
    sources = []
    for number, part in enumerate(parts):
        if part.target is operator.getitem and part.args[0].target in PARTS and part.args[1] == number:
            sources.append(part.args[0].args[0])
            along = Op(part.args[0])["dim"]
        elif part.target is aten.select.int and part.args[2] == number:
            sources.append(part.args[0])
            along = part.args[1]
        else:
            return None
        if along != 0:
            return None
    whole = tensor_meta(sources[0]) if len(set(sources)) == 1 else None
    total, mine = (None, tensor_meta(node)) if whole is None else (whole.numel(), tensor_meta(node))
    return sources[0] if mine is not None and total is not None and same(total, mine.numel()) else None
