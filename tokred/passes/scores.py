"""The scores on their way from q k^T to the softmax: their scale, their masks, the indices of their dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokred.compiler.capture import module_path, source_line, tensor_meta
from tokred.compiler.relations import Op, same
from tokred.compiler.report import Refusal
from tokred.passes.constants import CASTS, constant, magnitude
from tokred.passes.indices import PERMUTES, SAME, VIEWS, Layout, after, same_shape

__all__ = ["FILLS", "REARRANGING", "WHERE", "Added", "Filled", "Scores", "refuse"]

aten = torch.ops.aten

REARRANGING = VIEWS | PERMUTES | SAME | CASTS | {aten.expand.default}
WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
MODERATE = 1e4  # a bias below this hides no key beside a fill of -1e9


@dataclass
class Added:
    """`scores + factor * mask`; `layout` are the mask's dimensions."""

    mask: fx.Node
    factor: float
    layout: Layout


@dataclass
class Filled:
    """Scores replaced by `value` where `condition` holds (or, inverted, where it does not)."""

    condition: fx.Node
    inverted: bool
    value: float
    layout: Layout


def refuse(code: str, reason: str, node: fx.Node) -> Refusal:
    path, line = module_path(node), source_line(node)
    return Refusal(code, reason, f"{path} ({line})" if path else line)


@dataclass
class Scores:
    """What is known of the scores of one softmax at one node."""

    node: fx.Node
    layout: Layout
    scale: float
    softmax: fx.Node
    terms: list[Added | Filled] = field(default_factory=list)

    def step(self, node: fx.Node) -> Refusal | None:
        """Take the next node into account; None if its effect is understood."""
        refusal = self._step(node)
        self.node = node
        return refusal

    def _step(self, node: fx.Node) -> Refusal | None:
        target = node.target
        if target is aten.dropout.default or target in CASTS:
            return None
        if target in REARRANGING:
            layout = after(node, self.layout)
            if layout is None:
                return refuse("layout", f"cannot follow the scores through {node.name}", self.softmax)
            self.layout = layout
            return None
        meta, own = tensor_meta(node), tensor_meta(self.node)
        if meta is None or own is None or not same_shape(meta.shape, own.shape):
            return refuse("layout", f"{node.name} changes the shape of the scores", self.softmax)
        if target is aten.neg.default:
            self._multiply(-1.0)
            return None
        if target in (aten.mul.Tensor, aten.div.Tensor):
            return self._scaled(node)
        if target in (aten.add.Tensor, aten.sub.Tensor):
            other = node.args[1] if node.args[0] is self.node else node.args[0]
            alpha = constant(Op(node)["alpha"])
            if alpha is None or (alpha != 1.0 and other is node.args[0]):
                return refuse("scale", f"{node.name} scales the scores by an alpha", self.softmax)
            return self.add(other, -alpha if target is aten.sub.Tensor else alpha)
        return self._fill(node)

    def _multiply(self, factor: float) -> None:
        self.scale *= factor
        for term in self.terms:
            if isinstance(term, Added):
                term.factor *= factor
            else:
                term.value *= factor

    def _scaled(self, node: fx.Node) -> Refusal | None:
        other = node.args[1] if node.args[0] is self.node else node.args[0]
        number = constant(other)
        if number is None:
            return refuse("data-scale", f"the scores are multiplied by {other}, which is no constant", self.softmax)
        if number == 0.0 or not math.isfinite(number):
            return refuse("scale", f"the scores are scaled by {number}", self.softmax)
        self._multiply(1.0 / number if node.target is aten.div.Tensor else number)
        return None

    def add(self, other: Any, factor: float) -> Refusal | None:
        """`scores + factor * other`"""
        number = constant(other)
        if number is not None and math.isfinite(number):
            return None  # a softmax is blind to what is added to all scores
        meta = tensor_meta(other)
        if not isinstance(other, fx.Node) or other is self.node or meta is None or meta.is_complex():
            return refuse("mask", f"{other} is added to the scores", self.softmax)
        layout = self._beside(other)
        if layout is None:
            return refuse("layout", f"{other.name} is larger than the scores that it is added to", self.softmax)
        self.terms.append(Added(other, factor, layout))
        return None

    def _fill(self, node: fx.Node) -> Refusal | None:
        op = Op(node)
        if node.target in FILLS:
            condition, inverted, value = op["mask"], False, constant(op["value"])
        else:
            inverted = node.args[1] is self.node
            condition, value = op["condition"], constant(node.args[2] if inverted else node.args[1])
        if value is None:
            return refuse("fill", f"{node.name} replaces scores by what is no constant", self.softmax)
        meta = tensor_meta(condition)
        if meta is None or meta.dtype != torch.bool or meta.device != node.meta["val"].device:
            return refuse("mask", f"{condition} is no boolean mask", self.softmax)
        layout = self._beside(condition)
        if layout is None:
            return refuse("layout", f"{condition.name} is larger than the scores that it masks", self.softmax)
        self.terms.append(Filled(condition, inverted, value, layout))
        return None

    def _beside(self, node: fx.Node) -> Layout | None:
        """The layout of a tensor that is broadcast against the scores; None where it would enlarge them."""
        meta, own = tensor_meta(node), tensor_meta(self.node)
        assert own is not None
        if meta is None or meta.dim() > own.dim():
            return None
        layout = []
        for size, dim, whole in zip(reversed(meta.shape), reversed(self.layout), reversed(own.shape), strict=False):
            if not same(size, 1) and not same(size, whole):
                return None
            layout.append(() if same(size, 1) else dim)
        return tuple(reversed(layout))

    def unlike_sdpa(self, dtype: torch.dtype) -> Refusal | None:
        """Why the masks have no exact equivalent in SDPA; None if they have."""
        fills = [term for term in self.terms if isinstance(term, Filled)]
        finite = {term.value for term in fills if math.isfinite(term.value)}
        if any(not term.value < 0 for term in fills):
            return refuse("fill", "masked scores get a value that does not hide them", self.softmax)
        if not finite:
            return None
        added = [term for term in self.terms if isinstance(term, Added)]
        if self.terms[: len(added)] != added or any(not magnitude(term.mask) < MODERATE for term in added):
            reason = "a row that a finite fill and an additive mask hide together has no equivalent"
            return refuse("fill-and-bias", reason, self.softmax)
        if len(finite) > 1 or any(math.isinf(term.value) for term in fills):
            return refuse("fill", "two different values fill masked scores", self.softmax)
        if finite.pop() > (-6e4 if dtype is torch.float16 else -1e9):  # exp(fill - score) must be 0 for any sane score
            return refuse("fill", "masked scores get a value that may not hide them", self.softmax)
        return None
