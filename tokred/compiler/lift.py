"""The rewrite: run the captured graph once, node by node, into a new one in which token axes change length on the way.

Each value carries, for each dimension, the stage of the token axis that it is at. When an op's inputs are at different
stages, the older ones are brought forward through the token maps; where an op cannot run on a reduced axis its inputs
are restored first. Nothing that never meets a reduced axis is touched.
"""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any

import torch
from torch import fx

from tokred.compiler.align import ATTENTION, Aligner, CannotAlign, Value
from tokred.compiler.capture import STRIDED, source_line
from tokred.compiler.fake import run_fake
from tokred.compiler.graphs import as_module
from tokred.compiler.record import record
from tokred.compiler.relations import Link, Op, Window, flow_of, same
from tokred.compiler.staging import (
    Advance,
    Batch,
    Layout,
    Obstacle,
    Rows,
    Stage,
    advance,
    extent,
    rows_of,
)
from tokred.compiler.weights import weigh_attention, weigh_softmax, weighted_mean

__all__ = ["VIEWS", "Lift", "ShapeMismatch", "by_schema"]

aten = torch.ops.aten

VIEWS = STRIDED | {aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int}


class ShapeMismatch(Exception):
    """A node's real shape is not the one that the axis analysis predicted: the rewrite is not proved, so not used."""


class Lift:
    """Copies `source` node by node into `graph`; `cut` reduces a value, everything downstream follows."""

    def __init__(self, source: fx.GraphModule):
        self.source = source
        self.graph = fx.Graph(source)
        self.env: dict[fx.Node, Any] = {}  # Value, list of Values, or a plain node for numbers
        self.operands: dict[fx.Node, dict[str, Value]] = {}  # attention's q, k, v, mask as it really used them
        self.redirect: dict[tuple[fx.Node, fx.Node], Value] = {}  # (producer, consumer) -> value, for round trips
        self.restored: dict[fx.Node, tuple[str, str]] = {}  # node -> why, and what it is
        self.aligner = Aligner(self.env, self.emit, self.run)

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
            except CannotAlign as error:
                step = Obstacle(str(error))
        if given is None:
            self.restored[node] = (step.reason, source_line(node))
        whole = {key: self.aligner.restore(value) for key, value in inputs.items()}
        return self.call(op, {key: value.node for key, value in whole.items()}, [{} for _ in op.results])

    def _perform(self, op: Op, inputs: dict[tuple[str, int], Value], step: Advance) -> Any:
        ready = {key: self.aligner.align(op, key, value, step) for key, value in inputs.items()}
        nodes = {key: value.node for key, value in ready.items()}
        if op.target is ATTENTION:
            op = self._without_flag(op, ready["query", 0])
            weigh_attention(self, op, ready, nodes)
            self.operands[op.node] = {name: value for (name, _), value in ready.items()}
        elif "softmax" in step.along:
            weigh_softmax(self, ready, nodes, step.along["softmax"])
        if step.weighted_mean is not None:
            return weighted_mean(self, op, ready, step)
        if any(isinstance(relation, Window) for relation in flow_of(op) or []):
            return self._windows(op, ready, step)
        return self.call(op, nodes, step.outs)

    # -- rows at constant places ---------------------------------------------------------------------------------------

    def _without_flag(self, op: Op, query: Value) -> Op:
        """Causal attention counts queries from the first key; the last query alone sees every key and needs no flag."""
        rows = next((f for d, _, f in rows_of(query.layout) if d == len(query.shape) - 2), None)
        if rows is not None and op["is_causal"] and any(not stage.map.per_sample for stage in rows.stage.chain[1:]):
            op.arguments["is_causal"] = op["is_causal"] and rows.stage.head > 0
        return op

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
                return self.call(op, {key: v.node for key, v in ready.items()}, step.outs)
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
            results.append(self.checked(op, node, [step.outs[result]], result))
        return results if len(op.results) > 1 or isinstance(op.node.meta["val"], (list, tuple)) else results[0]

    @staticmethod
    def _window_result(op: Op, window: Window, relations: list[Any]) -> int:
        if window.out is not None:
            return window.out[0]
        return window.start if isinstance(op.node.meta["val"], (list, tuple)) else 0

    # -- building -----------------------------------------------------------------------------------------------------

    def call(self, op: Op, nodes: dict[tuple[str, int], fx.Node], outs: list[Layout]) -> Any:
        """Append the op with new inputs; shape literals on the token axis are derived anew; the shape is checked."""
        arguments = dict(op.arguments)
        for (name, index), node in nodes.items():
            value = arguments.get(name)
            if isinstance(value, (list, tuple)):
                arguments[name] = [node if i == index else item for i, item in enumerate(value)]
            else:
                arguments[name] = node
        own = self.graph
        arguments = dict(
            fx.map_arg(arguments, lambda n: self._node(self.env[n]) if n in self.env and n.graph is not own else n)
        )
        target: Any = op.target
        if target in VIEWS:
            target, arguments = aten.reshape.default, {"self": arguments["self"], "shape": self._shape(op, outs[0])}
        elif target in (aten.expand.default, aten.broadcast_to.default) and outs[0]:
            arguments["size"] = [-1 if d in outs[0] else s for d, s in enumerate(arguments["size"])]
        args, kwargs = by_schema(target, arguments)
        new = self.graph.call_function(target, args, kwargs)
        new.meta = {k: v for k, v in op.node.meta.items() if k in ("stack_trace", "nn_module_stack", "source_fn_stack")}
        fakes = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        new.meta["val"] = run_fake(target, *fakes)
        return self._check_all(op, new, outs)

    def _shape(self, op: Op, layout: Layout) -> list[Any]:
        """The view's sizes with the token dimensions at their present length; at most one is left to be inferred."""
        sizes: list[Any] = []
        for d, size in enumerate(op.out_shape()):
            size = extent(layout[d]) if d in layout else size
            sizes.append(size if isinstance(size, int) else self._symbol(op, d, d in layout))
        if sizes.count(-1) > 1:
            raise CannotAlign("a view with several run-time sizes")
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

    def checked(self, op: Op, new: fx.Node, outs: list[Layout], result: int = 0) -> Value:
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
        agree = len(predicted) == len(real) and all(same(p, r) for p, r in zip(predicted, real, strict=True))
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

    def finish(self, *, full: bool, short: Container[fx.Node] = (), extra: tuple[fx.Node, ...] = ()) -> fx.GraphModule:
        """Append the output, restored unless reduced tokens were asked for; `extra` nodes are returned behind it.

        What is in `short`, KV caches, stays as short as it is.
        """
        output = self.source.graph.output_node()

        def final(node: fx.Node) -> Any:
            value = self.env[node]
            if isinstance(value, Value) and full and node not in short:
                value = self.aligner.restore(value)
            return self._node(value)

        results: Any = fx.map_arg(output.args[0], final)
        self.graph.output((*results, *extra))
        module = as_module(self.source, self.graph)
        self.graph.eliminate_dead_code()
        module.recompile()
        return module


def _is_staged(value: Any) -> bool:
    return any(v.staged for v in value) if isinstance(value, list) else isinstance(value, Value) and value.staged


def _head(stage: Stage) -> int:
    return min((s.head for s in stage.chain[1:]), default=0)


def by_schema(target: Any, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by their schema's names, as an overload is called with them."""
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
