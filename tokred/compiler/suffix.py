"""What follows from a cut here? The layouts alone are pushed through the rest of the graph; nothing is built.

The answer says which rows must stay where they are (someone reads them by position), and where tokens would have to be
restored because an op needs all of them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from tokred.compiler.capture import tensor_meta
from tokred.compiler.relations import Op
from tokred.compiler.staging import Batch, Layout, Obstacle, Probe, Rows, Stage, advance, rows_of

__all__ = ["Suffix", "follow"]


@dataclass
class Suffix:
    """`head` and `tail` rows are read by position; `obstacles` are the ops that need all tokens, with the reason."""

    head: int = 0
    tail: int = 0
    obstacles: list[tuple[fx.Node, str]] = field(default_factory=list)
    reached: set[fx.Node] = field(default_factory=set)  # nodes that run on fewer tokens


def follow(
    node: fx.Node, batch_dim: int, token_dim: int, *, consumers: list[fx.Node] | None = None, exits: frozenset[Any] = frozenset()
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


def special_rows(node: fx.Node, token_dim: int, axes: Any, is_parameter: Any) -> tuple[int, int, tuple[int, int] | None]:
    """Learned tokens in front of and behind the patches, and the patches' grid, from the concatenation that made the axis."""
    tokens = axes.of(node)[token_dim]
    import torch

    grid = tuple(atom.size for atom in tokens) if len(tokens) == 2 else None
    for cat in node.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        if not cat < node or not axes.knows(cat):
            continue
        op = Op(cat)
        along = int(op.number("dim")) % len(op.out_shape())
        if axes.of(cat)[along] != tokens:
            continue
        parts = [(part, part.meta["val"].shape[along], axes.of(part)[along]) for _, _, part in op.tensors() if axes.knows(part)]
        learned = [_only_parameters(part, is_parameter) for part, _, _ in parts]
        if not any(learned) or all(learned):
            continue
        first, last = learned.index(False), len(learned) - 1 - learned[::-1].index(False)
        head = sum(size for _, size, _ in parts[:first])
        tail = sum(size for _, size, _ in parts[last + 1 :])
        middle = parts[first][2]
        inner = tuple(atom.size for atom in middle) if first == last and len(middle) == 2 else None
        if isinstance(head, int) and isinstance(tail, int):
            return head, tail, inner if inner and all(isinstance(s, int) for s in inner) else None
    valid = grid if grid and all(isinstance(s, int) for s in grid) else None
    return 0, 0, valid  # type: ignore[return-value]


def _only_parameters(node: fx.Node, is_parameter: Any) -> bool:
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


