"""Stages: how many token maps each dimension of a value has been through, and what an op does to that.

A *stage* is a token axis after some number of maps; its root is the axis untouched. A dimension of a staged value is a
product of factors: `Rows` of a stage, the `Batch` that the maps run over, and plain numbers. `advance` takes the
layouts of an op's inputs and answers with the layouts that it needs and those that it gives, or with the obstacle.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tokred.compiler.axis_moves import refine
from tokred.compiler.relations import Join, Kind, Link, Op, Reshape, Slot, Window, flow_of, same

__all__ = ["Advance", "Batch", "Factor", "Layout", "Obstacle", "Plain", "Rows", "Stage", "advance", "extent"]


@dataclass(eq=False)
class Stage:
    """A token axis after the maps from its root to here. `map` holds graph nodes; head and tail rows are untouched."""

    length: Any
    parent: Stage | None = None
    map: Any = None
    head: int = 0
    tail: int = 0
    size: Any = None  # node [B K] or None
    prop_attn: bool = False
    exits: frozenset[Any] = frozenset()  # nodes at which a round trip ends
    ordered: bool = False  # causal attention: a merged key is hidden as the row is that it stands in
    compact: bool = False  # rotary tables give its rows consecutive positions, in place of those that they had
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def root(self) -> Stage:
        return self if self.parent is None else self.parent.root

    @property
    def chain(self) -> list[Stage]:
        """From the root to here."""
        return [*(self.parent.chain if self.parent else []), self]

    def protects(self, head: int, tail: int) -> bool:
        """Whether the first `head` and the last `tail` rows are the root's own rows."""
        return all(head <= stage.head and tail <= stage.tail for stage in self.chain[1:])


@dataclass(eq=False)
class Probe(Stage):
    """A stage that is only asked about: it records which rows must stay where they are."""

    limit: int = 0

    def protects(self, head: int, tail: int) -> bool:
        if head > self.limit or tail > self.limit:
            return False
        self.head, self.tail = max(self.head, head), max(self.tail, tail)
        return True


@dataclass(frozen=True)
class Plain:
    size: Any


@dataclass(frozen=True)
class Batch:
    root: Stage
    size: Any


@dataclass(frozen=True)
class Rows:
    """Rows [lo, length - hi) of a stage; negative bounds are rows that were concatenated from elsewhere.

    `weighted` marks attention weights: normalised along these rows, so that summing over them is meant.
    """

    stage: Stage
    lo: int = 0
    hi: int = 0
    weighted: bool = False

    @property
    def full(self) -> Any:
        return self.stage.root.length - self.lo - self.hi

    @property
    def length(self) -> Any:
        return self.stage.length - self.lo - self.hi


Factor = Plain | Batch | Rows
Layout = dict[int, tuple[Factor, ...]]  # only the dimensions that hold Rows or a Batch


@dataclass(frozen=True)
class Obstacle:
    """Why an op cannot run on a reduced axis: its inputs are restored before it."""

    reason: str


@dataclass
class Advance:
    """What an op needs (for each tensor argument, its layout as it stands and as it must be) and what comes out."""

    needs: dict[tuple[str, int], tuple[Layout, Layout]]
    outs: list[Layout]
    broadcast: list[tuple[Slot, tuple[Factor, ...]]] = field(default_factory=list)  # size-one dims that meet a Batch
    weighted_mean: Rows | None = None
    along: dict[str, Rows] = field(default_factory=dict)  # "softmax": rows that attention weights run over


def extent(factors: tuple[Factor, ...], *, full: bool = False) -> Any:
    """The size of a dimension made of these factors, now or before any map."""
    size: Any = 1
    for factor in factors:
        size = size * ((factor.full if full else factor.length) if isinstance(factor, Rows) else factor.size)
    return size


def rows_of(layout: Layout) -> list[tuple[int, int, Rows]]:
    """Every Rows factor: dimension, place among the factors, factor."""
    return [(d, i, f) for d, factors in layout.items() for i, f in enumerate(factors) if isinstance(f, Rows)]


def advance(op: Op, layouts: dict[tuple[str, int], Layout], exit_of: Any = None) -> Advance | Obstacle:
    """Push the layouts of an op's tensor arguments through its rule."""
    flow = flow_of(op)
    if flow is None:
        return Obstacle(f"{op.target} has no rule")
    step = _Step(op, layouts, exit_of)
    for relation in flow:
        obstacle = step.take(relation)
        if obstacle is not None:
            return Obstacle(obstacle)
    return step.finish()


class _Step:
    def __init__(self, op: Op, layouts: dict[tuple[str, int], Layout], exit_of: Any):
        self.op, self.layouts, self.exit_of = op, layouts, exit_of
        self.needs = {key: (dict(layout), dict(layout)) for key, layout in layouts.items()}
        self.result = Advance(self.needs, [{} for _ in op.results])
        self.seen: set[Slot] = set()

    def take(self, relation: Any) -> str | None:
        if isinstance(relation, Link):
            return self.link(relation)
        if isinstance(relation, Window):
            return self.window(relation)
        if isinstance(relation, Join):
            return self.join(relation)
        return self.reshape(relation)

    def finish(self) -> Advance | Obstacle:
        for (name, index), (before, _) in self.needs.items():
            for dim, factors in before.items():
                if Slot(name, index, dim) not in self.seen:
                    what = "tokens" if any(isinstance(f, Rows) for f in factors) else "samples"
                    return Obstacle(f"{self.op.target} mixes {what}")
        return self.result

    def factors(self, slot: Slot) -> tuple[Factor, ...] | None:
        return self.layouts.get((slot.name, slot.item), {}).get(slot.dim)

    def link(self, link: Link) -> str | None:
        self.seen.update(link.ins)
        staged = [f for slot in link.ins if (f := self.factors(slot)) is not None]
        if not staged:
            return None
        target = self.meet(staged)
        if isinstance(target, str):
            return target
        rows = [f for f in target if isinstance(f, Rows)]
        if link.kind is Kind.CONTRACT and (not rows or not any(f.weighted for f in rows)):
            return f"{self.op.target} sums over tokens" if rows else f"{self.op.target} sums over the batch"
        if link.kind in (Kind.MEAN, Kind.SUM):
            if len(target) != 1 or not rows or self.result.weighted_mean is not None:
                return f"{self.op.target} averages over more than tokens"
            self.result.weighted_mean = rows[0]
        if link.kind in (Kind.MAX, Kind.SOFTMAX) and len(target) != len(rows):
            return f"{self.op.target} runs over the batch"
        for slot in link.ins:
            before, after = self.needs.setdefault((slot.name, slot.item), ({}, {}))
            if slot.dim not in before:
                before[slot.dim] = tuple(_at_root(f) for f in target)
            after[slot.dim] = target
        for slot in link.broadcast:
            self.result.broadcast.append((slot, target))
        if link.kind is Kind.SOFTMAX:
            target = tuple(replace(f, weighted=True) if isinstance(f, Rows) else f for f in target)
            self.result.along["softmax"] = rows[0]
        for result, dim in link.outs:
            self.result.outs[result][dim] = target
        return None

    def meet(self, staged: list[tuple[Factor, ...]]) -> tuple[Factor, ...] | str:
        """The stage at which inputs meet: the latest of them, unless a round trip ends here."""
        first = staged[0]
        merged = list(first)
        for other in staged[1:]:
            if len(other) != len(first):
                return "two inputs split this dimension differently"
            for i, (a, b) in enumerate(zip(merged, other, strict=True)):
                if isinstance(a, Rows) and isinstance(b, Rows):
                    if a.stage.root is not b.stage.root or (a.lo, a.hi) != (b.lo, b.hi):
                        return "two token axes meet"
                    merged[i] = Rows(_later(a.stage, b.stage), a.lo, a.hi, a.weighted or b.weighted)
                elif type(a) is not type(b) or (isinstance(a, Batch) and a.root is not b.root):  # type: ignore[union-attr]
                    return "two token axes meet"
                elif not same(a.size, b.size):  # type: ignore[union-attr]
                    return "two inputs split this dimension differently"
        for i, factor in enumerate(merged):
            if isinstance(factor, Rows) and self.exit_of is not None and self.exit_of in factor.stage.exits:
                merged[i] = replace(factor, stage=factor.stage.parent or factor.stage)
        return tuple(merged)

    def window(self, window: Window) -> str | None:
        self.seen.add(window.source)
        factors = self.factors(window.source)
        if factors is None:
            return None
        if len(factors) != 1 or not isinstance(factors[0], Rows):
            return f"{self.op.target} cuts a dimension that tokens share"
        rows = factors[0]
        start, stop, length = window.start, window.stop, rows.stage.root.length
        if not (isinstance(start, int) and (isinstance(stop, int) or same(stop, rows.full))):
            return f"{self.op.target} cuts tokens at a place that is not constant"
        first = rows.lo + start
        after_last = 0 if same(stop, rows.full) and rows.hi <= 0 else rows.hi + rows.full - stop
        if isinstance(stop, int) and rows.stage.protects(max(rows.lo + stop, 0), 0):
            return None  # rows at the head, which are the root's own
        if isinstance(length, int) and rows.stage.protects(0, max(length - first, 0)):
            return None  # rows at the tail
        if (
            window.out is None
            or not isinstance(after_last, int)
            or not rows.stage.protects(max(first, 0), max(after_last, 0))
        ):
            return f"{self.op.target} reads rows {start}:{stop} by position"
        result, dim = window.out
        self.result.outs[result][dim] = (Rows(rows.stage, first, after_last, rows.weighted),)
        return None

    def join(self, join: Join) -> str | None:
        self.seen.update(join.parts)
        staged = [(i, f) for i, slot in enumerate(join.parts) if (f := self.factors(slot)) is not None]
        if not staged:
            return None
        place, factors = staged[0]
        if len(staged) > 1 or len(factors) != 1 or not isinstance(factors[0], Rows):
            return f"{self.op.target} joins more than one reduced axis"
        rows = factors[0]
        lengths = [self.op.shape(slot.name, slot.item)[slot.dim] for slot in join.parts]
        if not all(isinstance(n, int) for i, n in enumerate(lengths) if i != place):
            return f"{self.op.target} joins tokens with a run-time number of others"
        lo, hi = rows.lo - sum(lengths[:place]), rows.hi - sum(lengths[place + 1 :])
        self.result.outs[join.out[0]][join.out[1]] = (Rows(rows.stage, lo, hi, rows.weighted),)
        return None

    def reshape(self, reshape: Reshape) -> str | None:
        layout = self.layouts.get((reshape.name, 0), {})
        factors: list[Factor] = []
        for dim, size in enumerate(self.op.shape(reshape.name)):
            self.seen.add(Slot(reshape.name, 0, dim))
            factors += layout.get(dim, (Plain(size),))
        sizes = [extent((factor,), full=True) for factor in factors]
        loose = [isinstance(factor, Plain) for factor in factors]
        split = refine(sizes, self.op.out_shape(), loose)
        if split is None:
            return "the view cuts through the token axis (a grid, or windows)"
        for dim, made in enumerate(split):
            taken = tuple(Plain(size) if loose[i] else factors[i] for i, size in made)
            if not all(isinstance(factor, Plain) for factor in taken):
                self.result.outs[0][dim] = taken
        return None


def _at_root(factor: Factor) -> Factor:
    return Rows(factor.stage.root, factor.lo, factor.hi) if isinstance(factor, Rows) else factor


def _later(a: Stage, b: Stage) -> Stage:
    """The later of two stages on one line, or the last one that both went through."""
    if a in b.chain:
        return b
    if b in a.chain:
        return a
    return next(stage for stage in reversed(a.chain) if stage in b.chain)
