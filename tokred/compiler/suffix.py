"""What follows from a cut here? The layouts alone are pushed through the rest of the graph; nothing is built.

The answer says which rows must stay where they are (someone reads them by position), and where tokens would have to be
restored because an op needs all of them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokred.compiler.axes import Axes, Dim
from tokred.compiler.capture import is_parameter, tensor_meta
from tokred.compiler.relations import Op, Window, flow_of
from tokred.compiler.staging import Batch, Layout, Obstacle, Probe, Rows, Stage, advance, rows_of

__all__ = ["Special", "Suffix", "follow", "only_parameters", "special_rows"]

aten = torch.ops.aten


@dataclass
class Suffix:
    """`head` and `tail` rows are read by position; `obstacles` are the ops that need all tokens, with the reason."""

    head: int = 0
    tail: int = 0
    obstacles: list[tuple[fx.Node, str]] = field(default_factory=list)
    reached: set[fx.Node] = field(default_factory=set)  # nodes that run on fewer tokens


def follow(
    node: fx.Node,
    batch_dim: int,
    token_dim: int,
    *,
    consumers: list[fx.Node] | None = None,
    exits: frozenset[Any] = frozenset(),
) -> Suffix:
    """Cut the tokens of `node` (for all consumers, or only for some, up to `exits`) and see what happens."""
    meta = tensor_meta(node)
    assert meta is not None
    length = meta.shape[token_dim]
    root = Stage(length)
    limit = length // 3 if isinstance(length, int) else 32
    probe = Probe(length, parent=root, exits=exits, limit=limit)
    start: Layout = {batch_dim: (Batch(root, meta.shape[batch_dim]),), token_dim: (Rows(probe),)}
    layouts: dict[fx.Node, list[Layout]] = {}
    suffix = Suffix()
    current: Any = node.next
    while current.op != "root":
        inputs: dict[tuple[str, int], Layout] = {}
        if current.op == "call_function" and current.target is not operator.getitem:
            for name, i, arg in Op(current).tensors():
                cut_here = arg is node and (consumers is None or current in consumers)
                inputs[name, i] = start if cut_here else layouts.get(arg, [{}])[0]
        elif current.target is operator.getitem and current.args[0] in layouts:
            layouts[current] = [layouts[current.args[0]][current.args[1]]]
        if any(rows_of(layout) for layout in inputs.values()):
            step = advance(Op(current), inputs, current)
            if isinstance(step, Obstacle):
                suffix.obstacles.append((current, step.reason))
            else:
                layouts[current] = step.outs
                suffix.reached.add(current)
        current = current.next
    suffix.head, suffix.tail = probe.head, probe.tail
    return suffix


@dataclass(frozen=True)
class Special:
    """Learned tokens in front of and behind the patches, and the patches' rows and columns if they show."""

    head: int = 0
    tail: int = 0
    grid: tuple[int, int] | None = None


def special_rows(node: fx.Node, token_dim: int, axes: Axes) -> Special:
    """What was concatenated to the patches when the token axis of `node` was made, directly or in several steps."""
    tokens = axes.of(node)[token_dim]
    for cat in node.graph.find_nodes(op="call_function", target=aten.cat.default):
        if cat < node and axes.knows(cat):
            op = Op(cat)
            along = int(op.number("dim")) % len(op.out_shape())
            if axes.of(cat)[along] == tokens:
                found = _concatenated(op, along, axes)
                if found is not None:
                    return found
    return Special(grid=_grid(tokens))


def _concatenated(op: Op, along: int, axes: Axes) -> Special | None:
    parts = [part for _, _, part in op.tensors() if axes.knows(part) and len(axes.of(part)) == len(op.out_shape())]
    fixed = [only_parameters(part) or _special_piece(part, along, axes) for part in parts]
    sizes = [part.meta["val"].shape[along] for part in parts]
    if not any(fixed) or all(fixed):
        return None
    first, last = fixed.index(False), len(fixed) - 1 - fixed[::-1].index(False)
    head, tail = sum(sizes[:first]), sum(sizes[last + 1 :])
    if not isinstance(head, int) or not isinstance(tail, int):
        return None
    middle = parts[first]
    grid = _grid(axes.of(middle)[along]) if first == last else None
    if grid is None and first == last and (whole := _sliced(middle, along)) is not None:
        inner = special_rows(whole[0], along, axes)
        grid = inner.grid if whole[1] == inner.head else None
    return Special(head, tail, grid)


def _special_piece(part: fx.Node, along: int, axes: Axes) -> bool:
    """The class token taken off an axis, to be put in front of another one."""
    whole = _sliced(part, along)
    return whole is not None and whole[1] == 0 and 0 < whole[2] <= special_rows(whole[0], along, axes).head


def _sliced(node: fx.Node, along: int) -> tuple[fx.Node, int, int] | None:
    """(x, start, stop) if `node` is x[start:stop] along this dimension, with constant bounds."""
    if node.target is not aten.slice.Tensor:
        return None
    op = Op(node)
    for relation in flow_of(op) or []:
        if isinstance(relation, Window) and relation.source.dim == along:
            if isinstance(relation.start, int) and isinstance(relation.stop, int):
                return op.operand("self"), relation.start, relation.stop
    return None


def _grid(tokens: Dim) -> tuple[int, int] | None:
    sizes = [atom.size for atom in tokens]
    return (sizes[0], sizes[1]) if len(sizes) == 2 and all(isinstance(size, int) for size in sizes) else None


def only_parameters(node: fx.Node) -> bool:
    """Whether a value is computed from parameters and constants alone."""
    queue, seen = [node], {node}
    while queue:
        current = queue.pop()
        if is_parameter(current):
            continue
        if current.op == "placeholder" and tensor_meta(current) is not None:
            return False
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return True
