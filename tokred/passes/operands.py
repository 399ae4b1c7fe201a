"""Where an attention's operand comes from, before it was scaled, cast, permuted, viewed or copied."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from tokred.compiler.capture import tensor_meta
from tokred.passes.constants import CASTS, constant
from tokred.passes.indices import Layout, before, flat, resolve, same_shape

__all__ = ["Operand", "climb"]

aten = torch.ops.aten


@dataclass
class Operand:
    """From which the operand follows: `operand = scale * rearranged(node)`. `root` is as far up as one sees."""

    node: fx.Node
    layout: Layout
    scale: float
    root: fx.Node
    above: list[tuple[fx.Node, Layout, float]]  # every such tensor, the operand itself first

    @property
    def highest(self) -> Layout:
        """The layout of the tensor farthest up that is scaled alike: what it lacks is copied further down."""
        return next(layout for _, layout, scale in reversed(self.above) if scale == self.scale)

    def nearest(self, target: Layout) -> tuple[fx.Node, Layout, float]:
        """The tensor from which `target` takes the least work."""
        wanted = set(flat(target))
        usable = [c for c in self.above if c[2] == self.scale and set(flat(c[1])) <= wanted]
        return min(
            reversed(usable), key=lambda candidate: _work(candidate[1], target)
        )  # of two alike that before a copy

    def work(self, target: Layout) -> int:
        return _work(self.nearest(target)[1], target)


def _work(layout: Layout, target: Layout) -> int:
    """0: nothing, 1: a permutation, 2: a reshape."""
    have, wanted = resolve(layout), resolve(target)
    if have == wanted:
        return 0
    return 1 if {dim for dim in have if dim} <= {dim for dim in wanted if dim} else 2


def climb(
    node: fx.Node, layout: Layout, dtype: torch.dtype, within: Callable[[fx.Node], bool], *, scaled: bool
) -> Operand | None:
    """Follow an operand upwards. None where neither it nor anything above has the dtype that SDPA would compute in."""
    found: list[tuple[fx.Node, Layout, float]] = []
    scale = 1.0
    while True:
        meta = tensor_meta(node)
        if meta is not None and meta.dtype == dtype:
            found.append((node, layout, scale))
        step = _step(node, layout, scaled) if node.op == "call_function" and within(node) else None
        if step is None:
            break
        node, layout, scale = step[0], step[1], scale * step[2]
    if not found:
        return None
    best = found[-1][2]
    source = next(candidate for candidate in found if candidate[2] == best)
    return Operand(source[0], source[1], best, node, found)


def _step(node: fx.Node, layout: Layout, scaled: bool) -> tuple[fx.Node, Layout, float] | None:
    """One op further up: its argument, the argument's layout, and the factor between them."""
    source = node.args[0] if node.args else None
    meta, above = tensor_meta(node), tensor_meta(source)
    if node.target in CASTS and isinstance(source, fx.Node) and meta is not None and above is not None:
        widens = above.is_floating_point() and torch.promote_types(above.dtype, meta.dtype) == meta.dtype
        return (source, layout, 1.0) if widens and above.device == meta.device else None
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and scaled:
        return _scaling(node, layout)
    if not isinstance(source, fx.Node) or above is None:
        return None
    lifted = before(node, layout)
    return (source, lifted, 1.0) if lifted is not None else None


def _scaling(node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout, float] | None:
    pairs = [(0, 1), (1, 0)] if node.target is aten.mul.Tensor else [(0, 1)]
    meta = tensor_meta(node)
    for mine, other in pairs:
        source, number = node.args[mine], constant(node.args[other])
        above = tensor_meta(source)
        if number is None or not number or not math.isfinite(number) or above is None or meta is None:
            continue
        kept = same_shape(above.shape, meta.shape) and above.dtype == meta.dtype
        if kept and isinstance(source, fx.Node):
            return source, layout, 1.0 / number if node.target is aten.div.Tensor else number
    return None
