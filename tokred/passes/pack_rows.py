"""The run over a graph that packs its tokens: each value is kept with all rows, or with the real ones, or both ways."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tokred.compiler.axes import Axes, Dim
from tokred.compiler.capture import tensor_meta
from tokred.compiler.fake import run_fake
from tokred.compiler.graphs import as_module
from tokred.compiler.lift import VIEWS, by_schema
from tokred.compiler.record import record
from tokred.compiler.relations import Kind, Link, Op, Reshape, Window, flow_of, same
from tokred.compiler.staging import Batch, Layout, Obstacle, Rows, Stage, advance, rows_of
from tokred.compiler.work import hint
from tokred.passes.constants import CASTS
from tokred.passes.graph_edit import keep_output_strides
from tokred.passes.indices import PERMUTES
from tokred.passes.padding import Claims, PaddingIsRead
from tokred.passes.real_rows import RealRows, extent_of, is_grid, layout_of

__all__ = ["Pack"]

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
# What gives at a row what it was given there, in another shape or type: zeros stay zeros.
CARRIES = VIEWS | PERMUTES | CASTS | {aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.clone.default}


@dataclass(eq=False)
class Value:
    """A tensor of the new graph: all rows (`full`), the real ones (`packed`), or both.

    `clean` says that `full` is what the model computes at every row, padding included. `shown` is an operand of the op
    that gave this value, with its dimensions of samples and tokens: where it is zero (or, by False, where it is not)
    the op does not look at its other operand.
    """

    origin: fx.Node
    full: fx.Node | None = None
    packed: fx.Node | None = None
    clean: bool = True
    layout: Layout = field(default_factory=dict)
    shape: tuple[Any, ...] = ()  # with all rows
    starts: bool = False
    shown: tuple[fx.Node, int, int, bool] | None = None

    @property
    def rows(self) -> bool:
        """Whether it is to be computed on the real rows."""
        return self.starts or not self.clean


class Pack:
    """One run over the graph, which is copied node by node; each value is kept whole or packed."""

    def __init__(self, gm: fx.GraphModule, axes: Axes, batch: Dim, tokens: Dim, starts: set[fx.Node]):
        self.gm, self.axes, self.starts = gm, axes, starts
        self.batch_dim, self.token_dim = batch, tokens
        self.batch, self.tokens = extent_of(batch), extent_of(tokens)
        self.stage = Stage(self.tokens)
        self.claims = Claims(self.batch, self.tokens)
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.attentions = 0
        self.work: list[fx.Node] = []  # what runs on real rows alone

    def run(self) -> fx.GraphModule:
        """The graph on real rows. Raises PaddingIsRead."""
        first = next(iter(self.starts)).meta["val"]
        for node in self.gm.graph.find_nodes(op="placeholder"):
            self.env[node] = self._clean(self.graph.node_copy(node), node)
        self.real = RealRows(self.graph, self.batch, self.tokens, first)
        for node in self.gm.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self.env[node] = self._visit(node)
        output = self.gm.graph.output_node()
        if not self.attentions:
            raise PaddingIsRead("no-attention", "no attention is reached by packed rows", output)
        self.graph.output(fx.map_arg(output.args[0], lambda n: self._whole(n, output)))
        self.graph.eliminate_dead_code()
        packed = as_module(self.gm, self.graph)
        keep_output_strides(packed, self.gm)
        packed.recompile()
        return packed

    # -- one node -----------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> Any:
        if node.target is operator.getitem and isinstance(self.env.get(node.args[0]), list):  # type: ignore[arg-type]
            return self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        inputs = {n: self.env[n] for n in node.all_input_nodes}
        if node in self.starts:
            return self._start(node)
        if not any(isinstance(value, Value) and value.rows for value in inputs.values()):
            return self._copy(node)
        if node.target is aten.sym_size.int or not isinstance(node.target, torch._ops.OpOverload):
            return self.graph.node_copy(node, lambda n: self._node(self.env[n]))
        _refuse_effects(node)
        op = Op(node)
        layouts = {(name, i): self.env[arg].layout if self.env[arg].rows else {} for name, i, arg in op.tensors()}
        made = self._row_by_row(op, layouts)
        return made if made is not None else self._on_all_rows(op, layouts)

    def _start(self, node: fx.Node) -> Any:
        """The first value of the packed region: computed packed if it can be, else packed once it is there."""
        layout = layout_of(self.axes.of(node), self.batch_dim, self.token_dim, self.stage)
        packed = None
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            op = Op(node)
            known = {(name, i): arg for name, i, arg in op.tensors()}
            layouts = {
                key: found
                if self.axes.knows(arg)
                and is_grid(found := layout_of(self.axes.of(arg), self.batch_dim, self.token_dim, self.stage))
                else {}
                for key, arg in known.items()
            }
            made = self._row_by_row(op, layouts, start=True) if any(layouts.values()) else None
            if isinstance(made, Value):
                packed, layout = made.packed, made.layout
        value = self._copy(node)
        value.packed, value.layout, value.starts = packed, layout, True
        return value

    def _clean(self, new: fx.Node, origin: fx.Node) -> Any:
        return Value(origin, full=new) if isinstance(new.meta.get("val"), Tensor) else new

    def _copy(self, node: fx.Node) -> Any:
        """What depends on no packed value is computed as it was."""
        return self._clean(self.graph.node_copy(node, lambda n: self._node(self.env[n])), node)

    def _node(self, value: Any) -> Any:
        return self._full(value) if isinstance(value, Value) else value

    # -- row by row ---------------------------------------------------------------------------------------------------

    def _row_by_row(self, op: Op, layouts: dict[tuple[str, int], Layout], *, start: bool = False) -> Any:
        """The op on the real rows, or None where it is not one function of each row, or takes what cannot be packed."""
        flow = flow_of(op)
        for relation in flow or []:
            slots = [] if isinstance(relation, Reshape) else _slots(relation)
            staged = any(slot.dim in layouts.get((slot.name, slot.item), {}) for slot in slots)
            if staged and not (isinstance(relation, Link) and relation.kind is Kind.EACH):
                return None
        step = advance(op, layouts)
        if flow is None or isinstance(step, Obstacle) or not all(is_grid(layout) for layout in step.outs):
            return None
        nodes: dict[tuple[str, int], fx.Node] = {}
        for name, i, arg in op.tensors():
            mine = [(slot.dim, f) for slot, f in step.broadcast if (slot.name, slot.item) == (name, i)]
            stretched = [dim for dim, factors in mine if rows_of({0: factors})]
            before, _ = step.needs.get((name, i), ({}, {}))
            packed = self._side(self.env[arg], before, stretched)
            if packed is None:
                return None
            nodes[name, i] = packed
        made = self._call(op, nodes, step.outs)
        if isinstance(made, Value) and not start:
            made.shown = self._shown(op, made.layout)
            self.work.append(op.node)
        return made

    def _side(self, value: Value, needed: Layout, stretched: list[int]) -> fx.Node | None:
        """An operand as rows: packed, or gathered from what has one row for each token or for each sample."""
        if value.rows:
            return self._packed(value)
        full = self._full(value)
        if not needed:
            return full
        if is_grid(needed):
            return self.real.gather(full, needed)
        (dim, factors), *more = needed.items()
        if more or len(factors) != 1:
            return None
        per_token = isinstance(factors[0], Rows)
        if not per_token and (len(stretched) != 1 or stretched[0] < 0):
            return None
        return self.real.pick(full, dim, None if per_token else stretched[0])

    def _shown(self, op: Op, layout: Layout) -> tuple[fx.Node, int, int, bool] | None:
        """See Value.shown; None where the op looks at all of its operands, or where the operand is not known whole."""
        if op.target is aten.mul.Tensor:
            candidates = [(op["other"], True), (op["self"], True)]
        elif op.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            candidates = [(op["mask"], False)]
        elif op.target in (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther):
            one, other = (isinstance(x := op[name], fx.Node) and self.env[x].rows for name in ("self", "other"))
            candidates = [(op["condition"], one)] if one != other else []
        else:
            return None
        place = {type(factors[0]): dim for dim, factors in layout.items() if len(factors) == 1}
        for node, by in candidates:
            if len(place) == 2 and isinstance(node, fx.Node) and not self.env[node].rows:
                missing = len(op.out_shape()) - node.meta["val"].dim()
                batch_dim, token_dim = (max(place[kind] - missing, -1) for kind in (Batch, Rows))
                if token_dim >= 0:
                    return node, batch_dim, token_dim, by
        return None

    def _call(self, op: Op, nodes: dict[tuple[str, int], fx.Node], outs: list[Layout]) -> Any:
        """The op on packed operands. None unless its shape is the one that the layout predicts: the proof."""
        shapes = [self.real.shape(op.out_shape(result), layout) for result, layout in enumerate(outs)]
        if op.target in VIEWS or op.target is aten.expand.default:
            view = (lambda x, *_: x.expand(shapes[0])) if op.target is aten.expand.default else None
            view = view or (lambda x, *_: x.reshape(shapes[0]))
            new = record(self.graph, view, (nodes["self", 0], self.real.rows, self.real.place))
        elif op.target is aten.slice.Tensor and op.dim() in outs[0]:
            new = nodes["self", 0]  # all rows from the first to the last
        else:
            new = self._emit(op, nodes)
        results = new.meta["val"]
        several = isinstance(results, (tuple, list))
        for shape, result in zip(shapes, results if several else [results], strict=True):
            if len(shape) != result.dim() or not all(same(a, b) for a, b in zip(shape, result.shape, strict=True)):
                return None
        if not several:
            return Value(op.node, packed=new, clean=False, layout=outs[0], shape=op.out_shape())
        return [
            Value(op.node, packed=self._item(new, i), clean=False, layout=layout, shape=op.out_shape(i))
            for i, layout in enumerate(outs)
        ]

    def _emit(self, op: Op, nodes: dict[tuple[str, int], fx.Node]) -> fx.Node:
        arguments = dict(op.arguments)
        for (name, i), node in nodes.items():
            value = arguments[name]
            listed = isinstance(value, (list, tuple))
            arguments[name] = [node if i == k else item for k, item in enumerate(value)] if listed else node
        arguments = dict(fx.map_arg(arguments, lambda n: n if n.graph is self.graph else self._node(self.env[n])))
        args, kwargs = by_schema(op.target, arguments)
        new = self.graph.call_function(op.target, args, kwargs)
        new.meta = {k: v for k, v in op.node.meta.items() if k in ("stack_trace", "nn_module_stack", "source_fn_stack")}
        new.meta["val"] = run_fake(op.target, *fx.map_arg((args, kwargs), lambda n: n.meta["val"]))
        return new

    def _item(self, new: fx.Node, i: int) -> fx.Node:
        item = self.graph.call_function(operator.getitem, (new, i))
        item.meta = {**new.meta, "val": new.meta["val"][i]}
        return item

    # -- packed and back ----------------------------------------------------------------------------------------------

    def _packed(self, value: Value) -> fx.Node:
        if value.packed is None:
            assert value.full is not None
            value.packed = self.real.gather(value.full, value.layout)
        return value.packed

    def _full(self, value: Value) -> fx.Node:
        """All rows; what is not known to be clean holds zeros at the padding."""
        if value.full is None:
            assert value.packed is not None
            value.full = self.real.scatter(value.packed, value.layout, value.shape)
        return value.full

    # -- what needs all rows ------------------------------------------------------------------------------------------

    def _on_all_rows(self, op: Op, layouts: dict[tuple[str, int], Layout]) -> Any:
        """The op as it was, on values with zeros at the padding, if nobody can tell; its rows are packed again."""
        if op.target is SDPA:
            return self._attention(op, layouts)
        if self._reads_real_rows(op, layouts):
            nodes = {(name, i): self._full(self.env[arg]) for name, i, arg in op.tensors()}
        else:
            nodes = {(name, i): self._whole(arg, op.node) for name, i, arg in op.tensors()}
        new = self._emit(op, nodes)
        if isinstance(new.meta["val"], Tensor):
            return Value(op.node, full=new)
        return [Value(op.node, full=self._item(new, i)) for i in range(len(new.meta["val"]))]

    def _attention(self, op: Op, layouts: dict[tuple[str, int], Layout]) -> Value:
        """Padding may ask, but is never asked: keys that the mask shows to anyone are real."""
        grid: Layout = {0: (Batch(self.stage, self.batch),), 2: (Rows(self.stage),)}
        for name in ("query", "key", "value"):
            if layouts[name, 0] and layouts[name, 0] != grid:
                raise PaddingIsRead("layout", "its heads and samples share a dimension, or tokens come first", op.node)
        if layouts["key", 0] or layouts["value", 0]:
            mask = op["attn_mask"]
            if mask is None:
                raise PaddingIsRead("unmasked", "an attention without a mask sees the padding", op.node)
            if self.env[mask].rows:
                raise PaddingIsRead("mask-is-computed", "the mask is computed from the tokens themselves", op.node)
            self.claims.keys(mask)
            self.attentions += 1
        new = self._emit(op, {(name, i): self._full(self.env[arg]) for name, i, arg in op.tensors()})
        if not layouts["query", 0]:
            return Value(op.node, full=new)
        packed = self.real.gather(new, grid)
        return Value(op.node, packed=packed, clean=False, layout=grid, shape=op.out_shape())

    def _reads_real_rows(self, op: Op, layouts: dict[tuple[str, int], Layout]) -> bool:
        """Rows read by position, or by an index: they become real, and what is read of them is what it was."""
        if op.target in (aten.select.int, aten.slice.Tensor):
            ((source, layout),) = layouts.items()
            size = op.shape(*source)[op.dim()]
            window = next((r for r in flow_of(op) or [] if isinstance(r, Window)), None)
            if window is None or layout.get(op.dim()) != (Rows(self.stage),):
                return False
            head, tail = _number(window.stop), _number(size - window.start)
            nearest = min((n for n in (head, tail) if n is not None), default=None)
            if nearest is None or not _few(nearest, size):
                return False
            self.claims.ends(*((nearest, 0) if nearest == head else (0, nearest)))
            return True
        if op.target is aten.index.Tensor:
            indices = [index for index in op["indices"] if index is not None]
            vectors = [n for n in indices if tensor_meta(n) is not None and n.meta["val"].dtype == torch.int64]
            flat = len(vectors) == len(indices) == 2 and op["indices"][:2] == indices
            grid: Layout = {0: (Batch(self.stage, self.batch),), 1: (Rows(self.stage),)}
            if flat and layouts["self", 0] == grid and not any(self.env[n].rows for n in vectors):
                self.claims.rows(*vectors)
                return True
        return False

    def _whole(self, node: fx.Node, reader: fx.Node) -> Any:
        """A value with all its rows as the model computes them; raises PaddingIsRead where they are not known."""
        value = self.env[node]
        if not isinstance(value, Value):
            return value
        if not value.clean:
            value.full = self._cleaned(value, reader)
            value.clean = True
        return self._full(value)

    def _cleaned(self, value: Value, reader: fx.Node) -> fx.Node:
        """Make real the rows that show through: at all others the value does not depend on what they hold."""
        op = Op(value.origin)
        if value.shown is not None:
            node, batch_dim, token_dim, by = value.shown
            self.claims.shown(node, batch_dim, token_dim, by=by)
            if op.target is aten.mul.Tensor:
                return self._full(value)  # zero, as it should be
            return self._emit(op, {(name, i): self._full(self.env[arg]) for name, i, arg in op.tensors()})
        if op.target in CARRIES:
            return self._emit(op, {(name, i): self._whole(arg, reader) for name, i, arg in op.tensors()})
        if reader.op == "output":
            raise PaddingIsRead("padding-is-returned", "the graph returns all rows, padding included", value.origin)
        raise PaddingIsRead("padding-is-read", f"{reader.target} reads all rows, padding included", reader)


def _refuse_effects(node: fx.Node) -> None:
    """What writes in place or draws random numbers would do it for other rows."""
    schema = node.target._schema  # type: ignore[union-attr]
    if schema.is_mutable:
        raise PaddingIsRead("padding-is-read", f"{node.target} writes in place", node)
    if torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
        given = Op(node).arguments
        chance, training = given.get("dropout_p", given.get("p", 1.0)), given.get("train", True)
        if chance != 0.0 and training is not False:
            raise PaddingIsRead("random", "it would draw other random numbers (dropout in training)", node)


def _number(size: Any) -> int | None:
    """A size that does not depend on the run, as a plain number."""
    if isinstance(size, torch.SymInt):
        return int(size.node.expr) if size.node.expr.is_Integer else None
    return int(size)


def _few(rows: int, size: Any) -> bool:
    """Fewer than half of the rows: to read all but the class token is to read the padding."""
    return 2 * rows <= hint(size)


def _slots(relation: Any) -> list[Any]:
    if isinstance(relation, Link):
        return list(relation.ins)
    return [relation.source] if isinstance(relation, Window) else list(relation.parts)
