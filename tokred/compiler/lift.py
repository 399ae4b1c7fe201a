"""The rewrite: run the captured graph once, node by node, into a new one in which token axes change length on the way.

Each value carries, for each dimension, the stage of the token axis that it is at. When an op's inputs are at different
stages, the older ones are brought forward through the token maps; where an op cannot run on a reduced axis its inputs
are restored first. Nothing that never meets a reduced axis is touched.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from tokred.compiler.capture import source_line, tensor_meta
from tokred.compiler.record import record
from tokred.compiler.relations import Kind, Link, Op, Window, flow_of
from tokred.compiler.residual import residual_of
from tokred.compiler.staging import (
    Advance,
    Batch,
    Factor,
    Layout,
    Obstacle,
    Plain,
    Rows,
    Stage,
    advance,
    extent,
    rows_of,
)

__all__ = ["Lift", "ShapeMismatch", "Value"]

aten = torch.ops.aten

ADDITIVE = {aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.add_.Tensor, aten.lerp.Scalar}
VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}
ATTENTION = aten.scaled_dot_product_attention.default


class ShapeMismatch(Exception):
    """A node's real shape is not the one that the axis analysis predicted: the rewrite is not proved, so not used."""


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


class Lift:
    """Copies `source` node by node into `graph`; `cut` reduces a value, everything downstream follows."""

    def __init__(self, source: fx.GraphModule):
        self.source = source
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}  # Value, list of Values, or a plain node for numbers
        self.operands: dict[fx.Node, dict[str, Value]] = {}  # attention's q, k, v, mask as it really used them
        self.redirect: dict[tuple[fx.Node, fx.Node], Value] = {}  # (producer, consumer) -> value, for round trips
        self.restored: dict[fx.Node, tuple[str, str]] = {}  # node -> why, and what it is
        self._memo: dict[Any, Value] = {}

    # -- one node -----------------------------------------------------------------------------------------------------

    def visit(self, node: fx.Node) -> None:
        """Run one node of the old graph on the values of the new one."""
        if node.op == "output":
            return
        if node.target is operator.getitem and isinstance(self.env.get(node.args[0]), list):  # type: ignore[arg-type]
            self.env[node] = self.env[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        values = {
            key: value for key in node.all_input_nodes if isinstance(value := self._input(key, node), (Value, list))
        }
        if not any(_is_staged(value) for value in values.values()):
            self.env[node] = self._copy(node)
            return
        self.env[node] = self.run(node, None)

    def _input(self, producer: fx.Node, consumer: fx.Node) -> Any:
        return self.redirect.get((producer, consumer), self.env[producer])

    def _copy(self, node: fx.Node) -> Any:
        new = self.graph.node_copy(node, lambda old: self._node(self._input(old, node)))
        return self._wrap(new, [{} for _ in range(64)], node)

    def _node(self, value: Any) -> Any:
        return value.node if isinstance(value, Value) else value

    def _wrap(self, new: fx.Node, layouts: list[Layout], origin: fx.Node) -> Any:
        """A Value for each tensor result, or the node itself for numbers and the like."""
        result = new.meta.get("val")
        if isinstance(result, torch.Tensor):
            return Value(new, layouts[0], origin)
        if isinstance(result, (list, tuple)) and result and all(isinstance(r, torch.Tensor) for r in result):
            values = []
            for i, tensor in enumerate(result):
                item = self.graph.call_function(operator.getitem, (new, i))
                item.meta = {key: new.meta[key] for key in ("stack_trace", "nn_module_stack") if key in new.meta}
                item.meta["val"] = tensor
                values.append(Value(item, layouts[i], origin))
            return values
        return new

    def run(self, node: fx.Node, given: dict[tuple[str, int], Value] | None) -> Any:
        """Run an op whose inputs are staged. `given` replaces the inputs (to compute stale rows)."""
        op = Op(node)
        inputs = given or {(name, i): self._input(arg, node) for name, i, arg in op.tensors()}
        step = advance(op, {key: value.layout for key, value in inputs.items()}, node)
        if not isinstance(step, Obstacle):
            try:
                return self._perform(op, inputs, step)
            except _CannotAlign as error:
                step = Obstacle(str(error))
        if given is None:
            self.restored[node] = (step.reason, source_line(node))
        whole = {key: self.restore(value) for key, value in inputs.items()}
        return self._call(op, {key: value.node for key, value in whole.items()}, [{} for _ in op.results])

    def _perform(self, op: Op, inputs: dict[tuple[str, int], Value], step: Advance) -> Any:
        ready = {key: self._align(op, key, value, step) for key, value in inputs.items()}
        nodes = {key: value.node for key, value in ready.items()}
        if op.target is ATTENTION:
            op = self._without_flag(op, ready["query", 0])
            self._weigh_attention(op, ready, nodes)
            self.operands[op.node] = {name: value for (name, _), value in ready.items()}
        elif "softmax" in step.along:
            self._weigh_softmax(ready, nodes, step.along["softmax"])
        if step.weighted_mean is not None:
            return self._weighted_mean(op, ready, step)
        if any(isinstance(relation, Window) for relation in flow_of(op) or []):
            return self._windows(op, ready, step)
        return self._call(op, nodes, step.outs)

    # -- alignment: forwards through maps, backwards by restoring -----------------------------------------------------

    def _align(self, op: Op, key: tuple[str, int], value: Value, step: Advance) -> Value:
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
                raise _CannotAlign("two reductions of one axis meet")
            value = self._back(value, dim, common)
            for stage in then.chain[then.chain.index(common) + 1 :]:
                if stage.map.per_sample:
                    value, dim = self._with_batch(op, key, value, dim, step)
                value = self._forward(value, dim, place, stage, self._role(op, key, value, dim))
        return value

    def _role(self, op: Op, key: tuple[str, int], value: Value, dim: int) -> str:
        """How side inputs are combined: added features by mean, key visibility by any, the rest by representative."""
        dtype = value.node.meta["val"].dtype
        if dtype == torch.bool:
            return "any" if op.target is ATTENTION and dim == len(value.shape) - 1 else "pick"
        several = len(rows_of(value.layout)) > 1
        return "reduce" if op.target in ADDITIVE and dtype.is_floating_point and not several else "pick"

    def _with_batch(self, op: Op, key: tuple[str, int], value: Value, dim: int, step: Advance) -> tuple[Value, int]:
        """Give a side input a batch dimension where broadcasting expects it: gathered rows differ per sample."""
        if any(isinstance(f, Batch) for factors in value.layout.values() for f in factors):
            return value, dim
        for slot, factors in step.broadcast:
            if (slot.name, slot.index) == key and any(isinstance(f, Batch) for f in factors):
                break
        else:
            raise _CannotAlign("a side input has no place for the batch that its rows now depend on")
        lead = max(-slot.dim, 0)
        place = max(slot.dim, 0)
        shape = (1,) * lead + value.shape
        size = extent(factors)
        sizes = [size if d == place else -1 for d in range(len(shape))]
        node = self.emit(lambda x: x.reshape(shape).expand(sizes), value.node)
        layout = {d + lead: f for d, f in value.layout.items()} | {place: factors}
        memo = Value(node, layout, value.origin)
        return memo, dim + lead

    def _forward(self, value: Value, dim: int, place: int, stage: Stage, role: str) -> Value:
        """Through one map, along one dimension. The same value through the same map is computed once."""
        memo_key = (value.node, dim, place, stage, role)
        if memo_key not in self._memo:
            rows = value.layout[dim][place]
            assert isinstance(rows, Rows) and stage.parent is rows.stage
            made = Rows(stage, rows.lo, rows.hi, rows.weighted)
            node = self._along(value, dim, place, lambda x, m: getattr(m, role)(x), stage, rows)
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
            again = self.run(node, inputs)
            if isinstance(again, Value):
                return again
        layout = {d: tuple(_before(f, stage) for f in factors) for d, factors in value.layout.items()}
        shape = [extent(layout[d]) if d in layout else size for d, size in enumerate(value.shape)]
        return Value(self.emit(lambda x: x.new_zeros(shape), value.node), layout)

    def _along(
        self, value: Value, dim: int, place: int, apply: Any, stage: Stage, rows: Rows, stale: Value | None = None
    ) -> fx.Node:
        """Apply a map's method along one factor of one dimension: lay out as [B N rest], apply, lay back."""
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
            arguments = (
                [lay_out(x, sizes[token]), part]
                if old is None
                else [lay_out(x, sizes[token]), part, lay_out(old, length - lo - hi)]
            )
            y = apply(*arguments) if len(arguments) == 3 or apply.__code__.co_argcount == 2 else apply(*arguments, None)
            if simple and rank == 3:
                return y
            y = y.reshape([y.shape[1] if i == token else sizes[i] for i in order]).permute(inverse)
            shape = [1] * rank
            for i, d in enumerate(owner):
                shape[d] = shape[d] * y.shape[i]
            return y.reshape(shape)

        result: fx.Node = self.emit(function, value.node, stage.map, None if stale is None else stale.node)
        return result

    # -- ops that know about tokens -----------------------------------------------------------------------------------

    def log_size(self, stage: Stage) -> fx.Node:
        if "log_size" not in stage.cache:
            stage.cache["log_size"] = self.emit(lambda size: size.clamp(min=1e-6).log(), stage.size)
        node: fx.Node = stage.cache["log_size"]
        return node

    def _size_bias(self, rows: Rows, lead: list[tuple[Factor, ...] | Any], like: fx.Node) -> fx.Node:
        """log(size) of the keys as [lead.. M], to be added to scores; rows from outside the axis weigh 1."""
        shape: list[Any] = []
        wide: list[Any] = []
        merged: list[Any] = []
        for factors in lead:
            parts = factors if isinstance(factors, tuple) else (Plain(1),)
            sizes = [f.size if isinstance(f, Batch) else 1 for f in parts]
            full = [f.size if isinstance(f, Batch) or len(parts) > 1 else 1 for f in parts if not isinstance(f, Rows)]
            shape += sizes
            wide += full
            merged.append(_times(full))
        lo, hi, dtype = rows.lo, rows.hi, like.meta["val"].dtype

        def function(bias: torch.Tensor) -> torch.Tensor:
            bias = bias[:, max(lo, 0) : bias.shape[1] - max(hi, 0)]
            if lo < 0 or hi < 0:
                bias = torch.nn.functional.pad(bias, (max(-lo, 0), max(-hi, 0)))
            return (
                bias.reshape([*shape, bias.shape[1]])
                .expand([*wide, bias.shape[1]])
                .reshape([*merged, bias.shape[1]])
                .to(dtype)
            )

        key = ("bias", lo, hi, str(lead), dtype)
        if key not in rows.stage.cache:
            rows.stage.cache[key] = self.emit(function, self.log_size(rows.stage))
        node: fx.Node = rows.stage.cache[key]
        return node

    def _without_flag(self, op: Op, query: Value) -> Op:
        """Causal attention counts queries from the first key; the last query alone sees every key and needs no flag."""
        rows = next((f for d, _, f in rows_of(query.layout) if d == len(query.shape) - 2), None)
        if rows is not None and op["is_causal"] and any(not stage.map.per_sample for stage in rows.stage.chain[1:]):
            op.arguments["is_causal"] = op["is_causal"] and rows.stage.head > 0
        return op

    def _weigh_attention(
        self, op: Op, ready: dict[tuple[str, int], Value], nodes: dict[tuple[str, int], fx.Node]
    ) -> None:
        """Proportional attention: merged keys weigh as many as they are (ToMe, equation 1)."""
        key = ready["key", 0]
        rank = len(key.shape)
        rows = next((f for d, _, f in rows_of(key.layout) if d == rank - 2), None)
        if rows is None or not rows.stage.prop_attn or rows.stage.size is None:
            return
        if op.arguments.get("is_causal"):
            raise _CannotAlign("causal attention takes no size bias")
        bias = self._size_bias(rows, [key.layout.get(d) for d in range(rank - 2)], nodes["query", 0])
        old = nodes.get(("attn_mask", 0))
        query = nodes["query", 0].meta["val"]

        def with_bias(bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            bias = bias.unsqueeze(-2)
            if mask is None:
                return bias
            return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else (mask + bias).to(query.dtype)

        nodes["attn_mask", 0] = self.emit(with_bias, bias, old)

    def _weigh_softmax(
        self, ready: dict[tuple[str, int], Value], nodes: dict[tuple[str, int], fx.Node], rows: Rows
    ) -> None:
        if not rows.stage.prop_attn or rows.stage.size is None:
            return
        value = ready["self", 0]
        dim = next(d for d, _, f in rows_of(value.layout) if f is rows or f == rows)
        rank = len(value.shape)
        lead = [value.layout.get(d) if d != dim and not _has_rows(value.layout.get(d)) else None for d in range(rank)]
        lead = lead[:dim] + lead[dim + 1 :]
        bias = self._size_bias(rows, lead, value.node)
        nodes["self", 0] = self.emit(lambda x, b: x + b.movedim(-1, dim), value.node, bias)

    def _weighted_mean(self, op: Op, ready: dict[tuple[str, int], Value], step: Advance) -> Any:
        """Mean (or sum) over tokens is that over the restored tokens; over kept ones where some are gone for good."""
        rows = step.weighted_mean
        assert rows is not None
        ((key, value),) = ready.items()
        if any(not stage.map.restorable for stage in rows.stage.chain[1:]):
            if op.target not in (aten.mean.dim, aten.mean.default):
                raise _CannotAlign(f"{op.target} over tokens of which some were dropped")
            return self._call(op, {key: value.node}, step.outs)
        dim = next(d for d, _, f in rows_of(value.layout) if f == rows)
        weight = self._pulled(rows)
        lead = [value.layout.get(d) for d in range(len(value.shape)) if d != dim]
        if any(isinstance(f, tuple) and len(f) != 1 for f in lead):
            raise _CannotAlign(f"{op.target} over tokens in an unusual layout")
        batch = next(d for d, f in enumerate(lead) if f is not None and isinstance(f[0], Batch))
        batch_dim = batch + (batch >= dim)
        rank, keep = len(value.shape), bool(op.arguments.get("keepdim", False))
        mean = op.target in (aten.mean.dim, aten.mean.default)

        def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            shape = [1] * rank
            shape[batch_dim], shape[dim] = w.shape[0], w.shape[1]
            w = w if batch_dim < dim else w.t()
            w = w.reshape(shape).to(x.dtype)
            total = (x * w).sum(dim, keepdim=keep)
            return total / w.sum(dim, keepdim=keep) if mean else total

        dims = op.arguments.get("dim")
        if dims is not None and len(dims if isinstance(dims, list) else [dims]) != 1:
            raise _CannotAlign(f"{op.target} over several dimensions")
        return self._checked(op, self.emit(function, value.node, weight), step.outs)

    def _pulled(self, rows: Rows) -> fx.Node:
        """[B K] for how many original rows each row of the stage stands when tokens are restored."""
        weight: fx.Node | None = None
        for stage in rows.stage.chain[1:]:
            key = ("pulled", rows.lo, rows.hi)
            if key not in stage.cache:
                before, length = weight, stage.parent.length  # type: ignore[union-attr]

                def function(m: Any, w: torch.Tensor | None, length: Any = length) -> torch.Tensor:
                    part = m.window(rows.lo, rows.hi, length) if rows.lo or rows.hi else m
                    index = (
                        part.keep if hasattr(part, "keep") else part.matrix if hasattr(part, "matrix") else part.index
                    )
                    if w is None:
                        w = torch.ones((index.shape[0], length - rows.lo - rows.hi), device=index.device)
                    pulled: torch.Tensor = part.pull(w)
                    return pulled

                stage.cache[key] = self.emit(function, stage.map, before)
            weight = stage.cache[key]
        assert weight is not None
        return weight

    def _windows(self, op: Op, ready: dict[tuple[str, int], Value], step: Advance) -> Any:
        """slice, select, split on the token axis: the same rows at their new places."""
        results = []
        value = ready["self", 0]
        windows = [relation for relation in flow_of(op) or [] if isinstance(relation, (Window, Link))]
        for result in range(len(op.results)):
            window = next(
                (w for w in windows if isinstance(w, Window) and self._window_result(op, w, windows) == result), None
            )
            if window is None or value.layout.get(window.source.dim) is None:
                return self._call(op, {key: v.node for key, v in ready.items()}, step.outs)
            dim = window.source.dim
            rows = value.layout[dim][0]
            assert isinstance(rows, Rows)
            shift = rows.stage.length - rows.stage.root.length
            at_tail = not rows.stage.protects(max(rows.lo + window.start, 0), 0) or not isinstance(window.start, int)
            head_only = isinstance(window.stop, int) and rows.lo + window.stop <= _head(rows.stage)
            start = window.start + (shift if at_tail and not head_only else 0)
            stop = window.stop if head_only else window.stop + shift
            if window.out is None:
                node = self.emit(lambda x, d=dim, i=start: x.select(d, i), value.node)
            else:
                node = self.emit(lambda x, d=dim, a=start, b=stop: aten.slice(x, d, a, b), value.node)
            results.append(self._checked(op, node, [step.outs[result]], result))
        return results if len(op.results) > 1 or isinstance(op.node.meta["val"], (list, tuple)) else results[0]

    @staticmethod
    def _window_result(op: Op, window: Window, relations: list[Any]) -> int:
        if window.out is not None:
            return window.out[0]
        return window.start if isinstance(op.node.meta["val"], (list, tuple)) else 0

    # -- building -----------------------------------------------------------------------------------------------------

    def _call(self, op: Op, nodes: dict[tuple[str, int], fx.Node], outs: list[Layout]) -> Any:
        """Append the op with new inputs; shape literals on the token axis are derived anew; the shape is checked."""
        arguments = dict(op.arguments)
        for (name, index), node in nodes.items():
            value = arguments.get(name)
            if isinstance(value, (list, tuple)):
                arguments[name] = [node if i == index else item for i, item in enumerate(value)]
            else:
                arguments[name] = node
        arguments = fx.map_arg(
            arguments, lambda n: self._node(self.env[n]) if n in self.env and n.graph is not self.graph else n
        )
        target: Any = op.target
        if target in VIEWS:
            target, arguments = aten.reshape.default, {"self": arguments["self"], "shape": self._shape(op, outs[0])}
        elif target in (aten.expand.default, aten.broadcast_to.default) and outs[0]:
            arguments["size"] = [-1 if d in outs[0] else s for d, s in enumerate(arguments["size"])]
        args, kwargs = _by_schema(target, arguments)
        new = self.graph.call_function(target, args, kwargs)
        new.meta = {k: v for k, v in op.node.meta.items() if k in ("stack_trace", "nn_module_stack", "source_fn_stack")}
        new.meta["val"] = _fake(new)
        return self._check_all(op, new, outs)

    def _shape(self, op: Op, layout: Layout) -> list[Any]:
        """The view's sizes with the token dimensions at their present length; at most one is left to be inferred."""
        sizes: list[Any] = []
        for d, size in enumerate(op.out_shape()):
            size = extent(layout[d]) if d in layout else size
            sizes.append(size if isinstance(size, int) else self._symbol(op, d, d in layout))
        if sizes.count(-1) > 1:
            raise _CannotAlign("a view with several run-time sizes")
        return sizes

    def _symbol(self, op: Op, dim: int, changed: bool) -> Any:
        """A run-time size: the model's own expression for it where it still holds, else inferred."""
        given = op.arguments.get("size", op.arguments.get("shape"))
        if not changed and isinstance(given, (list, tuple)) and isinstance(given[dim], fx.Node):
            return self._node(self.env[given[dim]])
        return -1

    def _check_all(self, op: Op, new: fx.Node, outs: list[Layout]) -> Any:
        value = self._wrap(new, outs, op.node)
        for result, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, Value):
                self._check(op, item, result)
        return value

    def _checked(self, op: Op, new: fx.Node, outs: list[Layout], result: int = 0) -> Value:
        for key in ("stack_trace", "nn_module_stack"):
            if key in op.node.meta:
                new.meta[key] = op.node.meta[key]
        value = Value(new, outs[0], op.node)
        self._check(op, value, result)
        return value

    def _check(self, op: Op, value: Value, result: int) -> None:
        """The proof: the real shape of every rewritten node is the one that its layout predicts."""
        predicted = [extent(value.layout[d]) if d in value.layout else s for d, s in enumerate(op.out_shape(result))]
        real = list(value.shape)
        agree = len(predicted) == len(real) and all(_agree(p, r) for p, r in zip(predicted, real, strict=True))
        if not agree:
            raise ShapeMismatch(f"{op.node.name}: predicted {predicted}, got {real} ({source_line(op.node)})")

    def emit(self, function: Any, *args: Any) -> Any:
        return record(self.graph, function, args)

    # -- cuts ---------------------------------------------------------------------------------------------------------

    def cut(
        self,
        node: fx.Node,
        batch_dim: int,
        token_dim: int,
        stage: Stage,
        reduced: fx.Node,
        consumers: list[fx.Node] | None,
    ) -> None:
        """Replace the value of `node` by its reduced form, for everyone or (a round trip) for some consumers."""
        value = self.env[node]
        batch = Batch(stage.root, value.shape[batch_dim])
        assert stage.parent is not None
        now = value.layout.get(token_dim, (Rows(stage.parent),))[0]
        assert isinstance(now, Rows)
        layout: Layout = {batch_dim: (batch,), token_dim: (Rows(stage, now.lo, now.hi),)}
        pre = Value(value.node, {batch_dim: (batch,), token_dim: (now,)}, value.origin, value.before_cut)
        made = Value(reduced, layout, value.origin, pre)
        if consumers is None:
            self.env[node] = made
        for consumer in consumers or []:
            self.redirect[node, consumer] = made

    def finish(self, *, full: bool, extra: tuple[fx.Node, ...] = ()) -> fx.GraphModule:
        """Append the output, restored unless reduced tokens were asked for; `extra` nodes are returned behind it."""
        output = self.source.graph.output_node()

        def final(node: fx.Node) -> Any:
            value = self.env[node]
            if isinstance(value, Value) and full:
                value = self.restore(value)
            return self._node(value)

        results: Any = fx.map_arg(output.args[0], final)
        self.graph.output((*results, *extra))
        module = fx.GraphModule(self.source, self.graph)
        self.graph.eliminate_dead_code()
        module.recompile()
        return module


class _CannotAlign(Exception):
    """Inputs cannot be brought to one stage: run the op at full length instead."""


def _went_through(value: Any, stage: Stage) -> bool:
    """Whether some dimension of a value has lost the rows that `stage` dropped."""
    return isinstance(value, Value) and any(stage in rows.stage.chain for _, _, rows in rows_of(value.layout))


def _before(factor: Factor, stage: Stage) -> Factor:
    """The factor as it was before `stage`."""
    if isinstance(factor, Rows) and stage in factor.stage.chain and stage.parent is not None:
        return Rows(stage.parent, factor.lo, factor.hi, factor.weighted)
    return factor


def _is_staged(value: Any) -> bool:
    return any(v.staged for v in value) if isinstance(value, list) else isinstance(value, Value) and value.staged


def _has_rows(factors: tuple[Factor, ...] | None) -> bool:
    return factors is not None and any(isinstance(f, Rows) for f in factors)


def _head(stage: Stage) -> int:
    return min((s.head for s in stage.chain[1:]), default=0)


def _times(sizes: list[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _row_by_row(op: Op) -> bool:
    """Whether each output row depends on the same row of the inputs alone, as far as the op's rule says."""
    flow = flow_of(op)
    return (
        flow is not None
        and all(not isinstance(r, Link) or r.kind in (Kind.EACH, Kind.CONTRACT) for r in flow)
        and op.target is not ATTENTION
    )


def _agree(predicted: Any, real: Any) -> bool:
    from tokred.compiler.relations import same

    return same(predicted, real)


def _by_schema(target: Any, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in target._schema.arguments:
        if argument.name not in arguments:
            continue
        value = arguments[argument.name]
        if argument.kwarg_only:
            if not (argument.has_default_value() and value is argument.default_value):
                kwargs[argument.name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def _fake(node: fx.Node) -> Any:
    """Run the op on the fake tensors of its inputs."""

    def value(n: fx.Node) -> Any:
        return n.meta["val"]

    fake = next(
        (t.fake_mode for n in node.all_input_nodes if (t := tensor_meta(n)) is not None and hasattr(t, "fake_mode")),
        None,
    )
    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    with torch.no_grad(), enable_python_dispatcher():
        if fake is None:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        with fake:
            return node.target(*args, **kwargs)  # type: ignore[operator]
