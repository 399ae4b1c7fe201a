"""Alignment: bring values to the stage at which an op wants them, forwards through token maps or back by restoring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokred.compiler.relations import Kind, Link, Op, flow_of
from tokred.compiler.residual import residual_of
from tokred.compiler.staging import Advance, Batch, Factor, Layout, Plain, Rows, Stage, extent, rows_of

__all__ = ["ATTENTION", "Aligner", "CannotAlign", "Value"]

aten = torch.ops.aten

ADDITIVE = {aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.add_.Tensor, aten.lerp.Scalar}
ATTENTION = aten.scaled_dot_product_attention.default


class CannotAlign(Exception):
    """Inputs cannot be brought to one stage: run the op at full length instead."""


@dataclass(eq=False)
class Value:
    """A tensor of the new graph and how its dimensions are staged."""

    node: fx.Node
    layout: Layout = field(default_factory=dict)
    origin: fx.Node | None = None  # the node of the old graph that made it
    before_cut: Value | None = None  # at a cut: the value with all its rows

    @property
    def staged(self) -> bool:
        return bool(rows_of(self.layout))

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.node.meta["val"].shape)


class Aligner:
    """Moves values along the chain of stages of their token axes; each move is made once.

    env     the value of each node of the old graph
    emit    record tensor code into the new graph
    rerun   run a node of the old graph again on other inputs (for the stale rows of pruned tokens)
    """

    def __init__(
        self,
        env: dict[fx.Node, Any],
        emit: Callable[..., Any],
        rerun: Callable[[fx.Node, dict[tuple[str, int], Value]], Any],
    ):
        self.env, self.emit, self.rerun = env, emit, rerun
        self.tables: set[fx.Node] = set()  # nodes of the old graph: rotary tables
        self.renumbered: set[fx.Node] = set()  # what took consecutive positions from them
        self._memo: dict[Any, Value] = {}

    def align(self, op: Op, key: tuple[str, int], value: Value, step: Advance) -> Value:
        """Bring one input to the stages that the op needs."""
        before, after = step.needs.get(key, ({}, {}))
        if all(before.get(dim) == factors for dim, factors in after.items()):
            return value
        value = Value(value.node, dict(before), value.origin, value.before_cut)
        moves = [
            (dim, place, rows.stage, goal.stage)
            for dim, place, rows in rows_of(before)
            if isinstance(goal := after[dim][place], Rows) and goal.stage is not rows.stage
        ]
        for dim, place, now, then in moves:
            common = now if now in then.chain else then
            if common not in now.chain or common not in then.chain:
                raise CannotAlign("two reductions of one axis meet")
            value = self._back(value, dim, common)
            for stage in then.chain[then.chain.index(common) + 1 :]:
                role = self._role(op, key, value, dim, stage)
                if stage.map.per_sample and role != "late":
                    value, dim = self._with_batch(op, key, value, dim, step, stage)
                value = self._forward(value, dim, place, stage, role)
        return value

    def _role(self, op: Op, key: tuple[str, int], value: Value, dim: int, stage: Stage) -> str:
        """How side inputs are combined: added features by mean, key visibility by any, the rest by representative.

        Rotary tables of a compact stage are not: their last rows are as good as their first (compiler/positions.py).
        """
        if stage.compact and value.origin in self.tables:
            self.renumbered.add(op.node)
            return "late"
        dtype = value.node.meta["val"].dtype
        if dtype == torch.bool:
            keys = op.target is ATTENTION and dim == len(value.shape) - 1
            return "any" if keys and not stage.ordered else "pick"
        several = len(rows_of(value.layout)) > 1
        return "reduce" if op.target in ADDITIVE and dtype.is_floating_point and not several else "pick"

    def _with_batch(
        self, op: Op, key: tuple[str, int], value: Value, dim: int, step: Advance, stage: Stage
    ) -> tuple[Value, int]:
        """Give a side input a batch dimension where broadcasting expects it: gathered rows differ per sample."""
        if any(isinstance(f, Batch) for factors in value.layout.values() for f in factors):
            return value, dim
        for slot, factors in step.broadcast:
            if (slot.name, slot.item) == key and any(isinstance(f, Batch) for f in factors):
                break
        else:
            raise CannotAlign("a side input has no place for the batch that its rows now depend on")
        lead = max(-slot.dim, 0)
        place = max(slot.dim, 0)
        shape = (1,) * lead + value.shape
        size = extent(factors)
        sizes = [size if d == place else -1 for d in range(len(shape))]
        node = self.emit(lambda x, _: x.reshape(shape).expand(sizes), value.node, stage.map)  # the map shows the size
        layout = {d + lead: f for d, f in value.layout.items()} | {place: factors}
        return Value(node, layout, value.origin), dim + lead

    def _forward(self, value: Value, dim: int, place: int, stage: Stage, role: str) -> Value:
        """Through one map, along one dimension. The same value through the same map is computed once."""
        memo_key = (value.node, dim, place, stage, role)
        if memo_key not in self._memo:
            rows = value.layout[dim][place]
            assert isinstance(rows, Rows) and stage.parent is rows.stage
            made = Rows(stage, rows.lo, rows.hi, rows.weighted)

            def apply(x: torch.Tensor, token_map: Any, _: Any) -> Any:
                return x[:, x.shape[1] - rows_left :] if role == "late" else getattr(token_map, role)(x)

            rows_left = made.length
            node = self._along(value, dim, place, apply, stage, rows)
            layout = dict(value.layout) | {
                dim: tuple(made if i == place else f for i, f in enumerate(value.layout[dim]))
            }
            self._memo[memo_key] = Value(node, layout, value.origin)
        return self._memo[memo_key]

    def restore(self, value: Value) -> Value:
        """The value with every token axis at full length."""
        for dim, _, rows in rows_of(value.layout):
            value = self._back(value, dim, rows.stage.root)
        return value

    def _back(self, value: Value, dim: int, goal: Stage) -> Value:
        """Restore one dimension to an earlier stage; copies through several merges are one gather."""
        while True:
            place, rows = next((i, f) for d, i, f in rows_of(value.layout) if d == dim)
            stage = rows.stage
            if stage is goal:
                return value
            key = (value.node, dim, "restore", stage)
            if key not in self._memo:
                assert stage.parent is not None
                made = Rows(stage.parent, rows.lo, rows.hi, rows.weighted)
                layout = dict(value.layout) | {
                    dim: tuple(made if i == place else f for i, f in enumerate(value.layout[dim]))
                }
                stale = None if stage.map.restorable else self._stale(value, stage)
                node = self._along(value, dim, place, lambda y, m, s: m.restore(y, s), stage, rows, stale)
                self._memo[key] = Value(node, layout, value.origin)
            value = self._memo[key]

    def _stale(self, value: Value, stage: Stage) -> Value:
        """`value` with the rows that `stage` dropped, as they were last: a pruned token keeps its last value.

        Row by row ops are repeated on the old rows; a residual branch adds nothing to a row that is gone; what is mixed
        from other rows (attention) is zero.
        """
        if value.before_cut is not None:
            older = value.before_cut
            return self._stale(older, stage) if _went_through(older, stage) else older
        node = value.origin
        source = None if node is None else residual_of(node)
        if source is not None:
            stream = self.env[source]
            if isinstance(stream, Value) and _went_through(stream, stage):
                return self._stale(stream, stage)
        if node is not None and node.op == "call_function" and _row_by_row(Op(node)):
            inputs: dict[tuple[str, int], Value] = {}
            for name, i, arg in Op(node).tensors():
                given = self.env[arg]
                inputs[name, i] = self._stale(given, stage) if _went_through(given, stage) else given
            again = self.rerun(node, inputs)
            if isinstance(again, Value):
                return again
        layout = {d: tuple(_before(f, stage) for f in factors) for d, factors in value.layout.items()}
        shape = [extent(layout[d]) if d in layout else size for d, size in enumerate(value.shape)]
        return Value(self.emit(lambda x: x.new_zeros(shape), value.node), layout)

    def _along(
        self, value: Value, dim: int, place: int, apply: Any, stage: Stage, rows: Rows, stale: Value | None = None
    ) -> fx.Node:
        """`apply(x, map, stale)` along one factor of one dimension: lay out as [B N rest], apply, lay back."""
        factors: list[Factor] = []
        owner: list[int] = []
        for d, size in enumerate(value.shape):
            for i, factor in enumerate(value.layout.get(d, (Plain(size),))):
                if (d, i) == (dim, place):
                    token = len(factors)
                factors.append(factor)
                owner.append(d)
        batch = next((i for i, f in enumerate(factors) if isinstance(f, Batch)), None)
        sizes = [extent((f,)) for f in factors]
        rest = [i for i in range(len(factors)) if i not in (token, batch)]
        order = ([] if batch is None else [batch]) + [token, *rest]
        inverse = [order.index(i) for i in range(len(order))]
        rank = len(value.shape)
        assert stage.parent is not None
        length, lo, hi = stage.parent.length, rows.lo, rows.hi
        simple = order == list(range(len(order))) and owner == list(range(len(owner))) and batch is not None

        def lay_out(x: torch.Tensor, count: Any) -> torch.Tensor:
            if simple and rank == 3:
                return x
            x = x.reshape([count if i == token else s for i, s in enumerate(sizes)]).permute(order)
            return x.reshape([x.shape[0], x.shape[1], -1] if batch is not None else [1, x.shape[0], -1])

        def function(x: torch.Tensor, token_map: Any, old: torch.Tensor | None) -> Any:
            part = token_map.window(lo, hi, length) if lo or hi else token_map
            stale_rows = None if old is None else lay_out(old, length - lo - hi)
            y = apply(lay_out(x, sizes[token]), part, stale_rows)
            if simple and rank == 3:
                return y
            y = y.reshape([y.shape[1] if i == token else sizes[i] for i in order]).permute(inverse)
            shape = [1] * rank
            for i, d in enumerate(owner):
                shape[d] = shape[d] * y.shape[i]
            return y.reshape(shape)

        result: fx.Node = self.emit(function, value.node, stage.map, None if stale is None else stale.node)
        return result


def _went_through(value: Any, stage: Stage) -> bool:
    """Whether some dimension of a value has lost the rows that `stage` dropped."""
    return isinstance(value, Value) and any(stage in rows.stage.chain for _, _, rows in rows_of(value.layout))


def _before(factor: Factor, stage: Stage) -> Factor:
    """The factor as it was before `stage`."""
    if isinstance(factor, Rows) and stage in factor.stage.chain and stage.parent is not None:
        return Rows(stage.parent, factor.lo, factor.hi, factor.weighted)
    return factor


def _row_by_row(op: Op) -> bool:
    """Whether each output row depends on the same row of the inputs alone, as far as the op's rule says."""
    flow = flow_of(op)
    return (
        flow is not None
        and all(not isinstance(r, Link) or r.kind in (Kind.EACH, Kind.CONTRACT) for r in flow)
        and op.target is not ATTENTION
    )
