"""Masked-key compaction: a padded batch computes its real tokens only.

Between the embeddings and the pooling, values are kept as [1 T C]: the T real rows of all samples one after the other.
What works row by row runs on them as it would on one sample. At each attention q, k and v are put back into their
padded form [B H N D], with zeros where nothing is, SDPA runs with the model's own mask, and its rows are packed again.

Which rows are real is computed at run time from all that reads rows (padding.py): so nothing that is left out was ever
read. Where something reads rows that cannot be told at run time, the graph is refused.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import _constrain_range_for_size

from tokred.compiler.axes import Axes, Dim
from tokred.compiler.blocks import Attention, find_blocks
from tokred.compiler.capture import source_line, tensor_meta
from tokred.compiler.fake import run_fake
from tokred.compiler.lift import VIEWS, by_schema
from tokred.compiler.machine import Machine
from tokred.compiler.options import Options
from tokred.compiler.record import record
from tokred.compiler.relations import Kind, Link, Op, Reshape, Window, flow_of, same
from tokred.compiler.report import Refusal
from tokred.compiler.residual import residual_of
from tokred.compiler.staging import Batch, Factor, Layout, Obstacle, Plain, Rows, Stage, advance, extent, rows_of
from tokred.compiler.work import flops, hint, moved, sizes_now
from tokred.passes.constants import CASTS
from tokred.passes.graph_edit import keep_output_strides
from tokred.passes.indices import PERMUTES
from tokred.passes.padding import Claims, PaddingIsRead

__all__ = ["Packing", "pack_tokens"]

aten = torch.ops.aten

RUN_TIME_KERNELS = 5  # nonzero, and the places of the real rows: see by_padding
SDPA = aten.scaled_dot_product_attention.default
# What gives at a row what it was given there, in another shape or type: zeros stay zeros.
CARRIES = VIEWS | PERMUTES | CASTS | {aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.clone.default}


@dataclass
class Packing:
    """Two graphs for one. `real` returns which rows anyone reads, [B N]; `packed` computes these rows alone.

    Both take the inputs of the graph that they are made from; `packed` takes three more: the numbers of the real rows
    [T], their mask [B N] and for each place [B N] which real row is there. `worth` is the share of padding above which
    the packed graph pays.
    """

    real: fx.GraphModule
    packed: fx.GraphModule
    blocks: int
    worth: float

    def __str__(self) -> str:
        return f"{self.blocks} attention blocks run on real tokens only where more than {self.worth:.0%} are padding"


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


def pack_tokens(gm: fx.GraphModule, options: Options) -> Packing | Refusal | None:
    """Both graphs, or why not; None where no attention of two or more samples has a mask."""
    if not any(node.target is SDPA and Op(node)["attn_mask"] is not None for node in gm.graph.nodes):
        return None
    axes = Axes(gm.graph)
    refusal = None
    tried = set()
    for block in find_blocks(gm, axes).attentions:
        if block.anchor.target is not SDPA or block.mask is None or block.form != "self" or block.axis in tried:
            continue
        tried.add(block.axis)
        query = axes.of(block.query)
        if len(query) != 4 or not query[0] or not query[2] or set(query[0]) & set(query[2]):
            continue
        if options.recipe.methods:
            return Refusal("recipe", "tokens that a recipe leaves out are not packed as well", block.source)
        for starts in _beginnings(block, query[0], query[2], axes):
            try:
                return _Pack(gm, axes, query[0], query[2], starts).run()
            except PaddingIsRead as obstacle:
                refusal = refusal or Refusal(obstacle.code, str(obstacle), source_line(obstacle.node))
    return refusal


def share_that_pays(pack: _Pack, real: fx.GraphModule) -> float:
    """The share of padding from which on fewer rows save twice what looking for them and moving them costs.

    Raises PaddingIsRead where looking alone would slow batches without padding by more than 3 %, or where more than
    half of a batch would have to be padding.
    """
    machine = Machine.of(real.graph.output_node().args[0][0].meta["val"].device)  # type: ignore[index, union-attr]
    looks = [node for node in real.graph.nodes if node.op == "call_function"]
    work: dict[torch.dtype, float] = defaultdict(float)
    for node in pack.work:
        work[node.meta["val"].dtype if tensor_meta(node) is not None else torch.float32] += flops(node)
    saved = machine.seconds(work, sum(moved(node) for node in pack.work))
    look = machine.seconds({}, sum(moved(node) for node in looks), len(looks) + RUN_TIME_KERNELS)
    share = 2 * (look + machine.seconds({}, pack.copied)) / saved if saved else 1.0
    if look > 0.03 * saved or share > 0.5:
        costs, gains = 1e3 * (look + machine.seconds({}, pack.copied)), 1e3 * saved
        text = f"to find and to move the real rows costs {costs:.2g} ms, and all rows together {gains:.2g} ms"
        raise PaddingIsRead("does-not-pay", text, pack.work[0])
    return max(share, 0.05)


def _beginnings(block: Attention, batch: Dim, tokens: Dim, axes: Axes) -> Iterator[set[fx.Node]]:
    """Where packing may begin: at the embeddings, or else at the residual stream that enters the first attention."""
    starts, seen, queue = set(), {block.query}, [block.query]
    while queue:
        node = queue.pop()
        above = [n for n in _operands(node) if _has_features(n, batch, tokens, axes)]
        if not above:
            starts.add(node)
        queue += [n for n in above if n not in seen]
        seen.update(above)
    yield starts
    stream = residual_of(block.join) if block.join is not None else None
    if stream is not None and _has_features(stream, batch, tokens, axes) and {stream} != starts:
        yield {stream}


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    """What a node is computed from, where one part of several results is taken as one step."""
    for source in node.all_input_nodes:
        if isinstance(source.meta.get("val"), (tuple, list)):
            yield from _operands(source)
        else:
            yield source


def _has_features(node: fx.Node, batch: Dim, tokens: Dim, axes: Axes) -> bool:
    """One row of features for each token: masks have no features, ids are no floats."""
    meta = tensor_meta(node)
    if meta is None or not meta.is_floating_point() or not axes.knows(node):
        return False
    layout = _layout(axes.of(node), batch, tokens, Stage(0))
    others = [size for dim, size in enumerate(meta.shape) if dim not in layout]
    return _is_grid(layout) and not all(same(size, 1) for size in others)


def _layout(dims: list[Dim], batch: Dim, tokens: Dim, stage: Stage) -> Layout:
    """Which factors of which dimensions are the samples and the tokens."""
    layout: Layout = {}
    for d, atoms in enumerate(dims):
        factors: list[Factor] = []
        place = 0
        while place < len(atoms):
            if atoms[place : place + len(batch)] == batch:
                factors.append(Batch(stage, _extent(batch)))
                place += len(batch)
            elif atoms[place : place + len(tokens)] == tokens:
                factors.append(Rows(stage))
                place += len(tokens)
            else:
                factors.append(Plain(atoms[place].size))
                place += 1
        if any(not isinstance(factor, Plain) for factor in factors):
            layout[d] = tuple(factors)
    return layout


def _extent(dim: Dim) -> Any:
    size: Any = 1
    for atom in dim:
        size = size * atom.size
    return size


def _is_grid(layout: Layout) -> bool:
    """One factor of samples and one of whole tokens: a value with a row for each."""
    factors = [factor for dim in layout.values() for factor in dim]
    rows = [factor for factor in factors if isinstance(factor, Rows)]
    return len(rows) == 1 and rows[0].lo == rows[0].hi == 0 and sum(isinstance(f, Batch) for f in factors) == 1


class _Pack:
    """One run over the graph, which is copied node by node; each value is kept whole or packed."""

    def __init__(self, gm: fx.GraphModule, axes: Axes, batch: Dim, tokens: Dim, starts: set[fx.Node]):
        self.gm, self.axes, self.starts = gm, axes, starts
        self.batch_dim, self.token_dim = batch, tokens
        self.batch, self.tokens = _extent(batch), _extent(tokens)
        self.stage = Stage(self.tokens)
        self.claims = Claims(self.batch, self.tokens)
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.attentions = 0
        self.work: list[fx.Node] = []  # what runs on real rows alone
        self.copied = 0.0  # bytes read and written by packing and unpacking, if all rows are real

    def run(self) -> Packing:
        first = next(iter(self.starts)).meta["val"]
        for node in self.gm.graph.find_nodes(op="placeholder"):
            self.env[node] = self._clean(self.graph.node_copy(node), node)
        self._new_inputs(first)
        for node in self.gm.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self.env[node] = self._visit(node)
        output = self.gm.graph.output_node()
        if not self.attentions:
            raise PaddingIsRead("no-attention", "no attention is reached by packed rows", output)
        self.graph.output(fx.map_arg(output.args[0], lambda n: self._whole(n, output)))
        self.graph.eliminate_dead_code()
        packed = fx.GraphModule(self.gm, self.graph)
        keep_output_strides(packed, self.gm)
        packed.recompile()
        real = self.claims.build(self.gm, first.device)
        return Packing(real, packed, self.attentions, share_that_pays(self, real))

    def _new_inputs(self, like: Any) -> None:
        """The rows' numbers, mask and places; T is a size that nothing may be concluded from."""
        mode, env = like.fake_mode, like.fake_mode.shape_env
        with env.ignore_fresh_unbacked_symbols(), mode:
            count = env.create_unbacked_symint()
            _constrain_range_for_size(count, 2)
            options: Any = {"dtype": torch.int64, "device": like.device}
            values = {
                "packed_rows": torch.empty(count, **options),
                "packed_mask": torch.empty(self.batch, self.tokens, dtype=torch.bool, device=like.device),
                "packed_place": torch.empty(self.batch, self.tokens, **options),
            }
        self.count = values["packed_rows"].shape[0]
        nodes = [self.graph.placeholder(name) for name in values]
        for node, value in zip(nodes, values.values(), strict=True):
            node.meta["val"] = value
        self.rows, self.mask, self.place = nodes

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
        layout = _layout(self.axes.of(node), self.batch_dim, self.token_dim, self.stage)
        packed = None
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            op = Op(node)
            known = {(name, i): arg for name, i, arg in op.tensors()}
            layouts = {
                key: found
                if self.axes.knows(arg)
                and _is_grid(found := _layout(self.axes.of(arg), self.batch_dim, self.token_dim, self.stage))
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
            staged = any(slot.dim in layouts.get((slot.name, slot.index), {}) for slot in slots)
            if staged and not (isinstance(relation, Link) and relation.kind is Kind.EACH):
                return None
        step = advance(op, layouts)
        if flow is None or isinstance(step, Obstacle) or not all(_is_grid(layout) for layout in step.outs):
            return None
        nodes: dict[tuple[str, int], fx.Node] = {}
        for name, i, arg in op.tensors():
            mine = [(slot.dim, f) for slot, f in step.broadcast if (slot.name, slot.index) == (name, i)]
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
        if _is_grid(needed):
            return self._gather(full, needed)
        (dim, factors), *more = needed.items()
        if more or len(factors) != 1:
            return None
        per_token = isinstance(factors[0], Rows)
        if not per_token and (len(stretched) != 1 or stretched[0] < 0):
            return None

        def pick(x: Tensor, rows: Tensor, place: Tensor) -> Tensor:
            if per_token:
                return x.index_select(dim, rows % place.shape[1])  # [.. N ..] -> [.. T ..]
            return x.index_select(dim, rows // place.shape[1]).transpose(dim, stretched[0])  # [B 1 ..] -> [1 T ..]

        return record(self.graph, pick, (full, self.rows, self.place))

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
        shapes = [self._shape(op.out_shape(result), layout) for result, layout in enumerate(outs)]
        if op.target in VIEWS or op.target is aten.expand.default:
            view = (lambda x, *_: x.expand(shapes[0])) if op.target is aten.expand.default else None
            view = view or (lambda x, *_: x.reshape(shapes[0]))
            new = record(self.graph, view, (nodes["self", 0], self.rows, self.place))
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

    def _shape(self, shape: tuple[Any, ...], layout: Layout) -> list[Any]:
        """The sizes of a packed value: samples are one, tokens are T."""
        sizes, count = list(shape), {Batch: 1, Rows: self.count}
        for dim, factors in layout.items():
            sizes[dim] = extent(tuple(f if isinstance(f, Plain) else Plain(count[type(f)]) for f in factors))
        return sizes

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
            value.packed = self._gather(value.full, value.layout)
        return value.packed

    def _full(self, value: Value) -> fx.Node:
        """All rows; what is not known to be clean holds zeros at the padding."""
        if value.full is None:
            assert value.packed is not None
            value.full = self._scatter(value.packed, value.layout, value.shape)
        return value.full

    def _gather(self, full: fx.Node, layout: Layout) -> fx.Node:
        """[.. B .. N ..] -> [.. 1 .. T ..]"""
        self.copied += 2 * _nbytes(full)
        split, order = _factorised(layout, tuple(full.meta["val"].shape))
        shape = self._shape(tuple(full.meta["val"].shape), layout)

        def gather(x: Tensor, rows: Tensor, place: Tensor) -> Tensor:
            x = x.reshape(split).permute(order).flatten(0, 1).index_select(0, rows)  # [B*N ..] -> [T ..]
            return x.unsqueeze(0).permute(_inverse(order)).reshape(shape)

        return record(self.graph, gather, (full, self.rows, self.place))

    def _scatter(self, packed: fx.Node, layout: Layout, shape: tuple[Any, ...]) -> fx.Node:
        """[.. 1 .. T ..] -> [.. B .. N ..], zeros where there is no row"""
        split, order = _factorised(layout, shape)
        short = [self.count if i == order[1] else 1 if i == order[0] else size for i, size in enumerate(split)]

        def scatter(x: Tensor, rows: Tensor, place: Tensor, mask: Tensor) -> Tensor:
            x = x.reshape(short).permute(order).flatten(0, 1)  # [T ..]
            x = x.index_select(0, place.flatten()).unflatten(0, place.shape)  # [B N ..]
            x = torch.where(mask.reshape(tuple(mask.shape) + (1,) * (x.dim() - 2)), x, x.new_zeros(()))
            return x.permute(_inverse(order)).reshape(shape)

        full: fx.Node = record(self.graph, scatter, (packed, self.rows, self.place, self.mask))
        self.copied += 2 * _nbytes(full)
        return full

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
        packed = self._gather(new, grid)
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
            *shown, by = value.shown
            self.claims.shown(*shown, by=by)
            if op.target is aten.mul.Tensor:
                return self._full(value)  # zero, as it should be
            return self._emit(op, {(name, i): self._full(self.env[arg]) for name, i, arg in op.tensors()})
        if op.target in CARRIES:
            return self._emit(op, {(name, i): self._whole(arg, reader) for name, i, arg in op.tensors()})
        if reader.op == "output":
            raise PaddingIsRead("padding-is-returned", "the graph returns all rows, padding included", value.origin)
        raise PaddingIsRead("padding-is-read", f"{reader.target} reads all rows, padding included", reader)


def _nbytes(node: fx.Node) -> float:
    """Of a tensor as large as it was when the graph was traced."""
    meta = node.meta["val"]
    return float(math.prod(sizes_now(node)) * meta.element_size())


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


def _factorised(layout: Layout, shape: tuple[Any, ...]) -> tuple[list[Any], list[int]]:
    """The sizes of all factors, and the order that puts samples and tokens in front."""
    factors = [factor for dim, size in enumerate(shape) for factor in layout.get(dim, (Plain(size),))]
    first = [i for i, factor in enumerate(factors) if isinstance(factor, Batch)]
    first += [i for i, factor in enumerate(factors) if isinstance(factor, Rows)]
    return [extent((factor,)) for factor in factors], first + [i for i in range(len(factors)) if i not in first]


def _inverse(order: list[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]
