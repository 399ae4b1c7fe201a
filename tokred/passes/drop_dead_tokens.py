"""Token liveness: dead-code elimination along the token axis.

A classifier that reads only the class token needs, in its last block, one query row, one output row and one MLP row.
The demand runs backwards through the op rules (which rows of this value does anyone read?), then the graph is lifted
with the rows that nobody reads left out. The same numbers, less work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import fx

from tokred.compiler.align import Value
from tokred.compiler.axes import Axes
from tokred.compiler.axis_moves import refine
from tokred.compiler.capture import is_parameter, source_line, tensor_meta
from tokred.compiler.lift import Lift
from tokred.compiler.relations import Flow, Kind, Link, Op, Reshape, Slot, Window, flow_of, same
from tokred.compiler.staging import Rows, Stage
from tokred.registry.ends import Ends

__all__ = ["drop_dead_tokens"]

aten = torch.ops.aten

SDPA = torch.ops.aten.scaled_dot_product_attention.default

WORTH = {torch.ops.aten.linear.default, torch.ops.aten.addmm.default, torch.ops.aten.matmul.default, SDPA}


Bound = Callable[[fx.Node], tuple[Op, Flow | None]]


class Demand(NamedTuple):
    """Rows read at the front and at the back of a dimension, or of each of `outer` blocks of rows: [outer*N]."""

    head: int
    tail: int
    outer: int = 1


def drop_dead_tokens(gm: fx.GraphModule, log: list[str]) -> fx.GraphModule:
    """Compute only the rows that are read. Returns `gm` itself where all are, or where it would save no projection."""
    demands = _demands(gm)
    if not any(node.target in WORTH for node in demands):
        return gm
    axes = Axes(gm.graph)
    lift = Lift(gm)
    stages: dict[Any, Stage] = {}
    for node in gm.graph.nodes:
        if node in demands:
            for dim, demand in demands[node].items():
                if demand.outer == 1:
                    _narrow(lift, node, dim, demand, axes, stages)
        lift.visit(node)
    if lift.restored:
        where = next(iter(lift.restored))
        raise ValueError(f"{where.name} needs the rows that nobody reads: {lift.restored[where][0]}")
    for node, wanted in demands.items():
        if node.target in WORTH and lift.env[node].staged:
            demand, *_ = wanted.values()
            log.append(f"{node.name}: {demand.head + demand.tail} of its rows are read ({source_line(node)})")
    return lift.finish(full=True) if log else gm


def _demands(gm: fx.GraphModule) -> dict[fx.Node, dict[int, Demand]]:
    """For each tensor, the dimensions of which only a few rows at the ends are read; others are read whole."""
    demands: dict[fx.Node, dict[int, Demand]] = {}
    bound = cache(_bound)
    for node in reversed(gm.graph.nodes):
        meta = tensor_meta(node)
        if meta is None or node.op != "call_function" or not node.users:
            continue
        if any(_reads_all(user, demands, bound) for user in node.users):
            continue
        wanted: dict[int, Demand] = {}
        for dim, size in enumerate(meta.shape):
            demand = _together(_read(user, node, dim, demands, bound) for user in node.users)
            if demand and node.target is SDPA and Op(node)["is_causal"] and not _causal_ends(demand):
                continue
            if demand and isinstance(size, int) and 0 < 2 * (demand.head + demand.tail) * demand.outer <= size:
                wanted[dim] = demand
        if len(wanted) == 1:
            demands[node] = wanted
    return demands


def _together(reads: Iterable[Demand | None]) -> Demand | None:
    """What several readers read between them: None where one of them reads all, or they count rows differently."""
    head = tail = outer = 0
    for read in reads:
        if read is None or (outer and read.outer != outer and read.head + read.tail):
            return None
        if read.head + read.tail:
            head, tail, outer = max(head, read.head), max(tail, read.tail), read.outer
    return Demand(head, tail, outer or 1)


def _bound(node: fx.Node) -> tuple[Op, Flow | None]:
    op = Op(node)
    return op, flow_of(op)


def _reads_all(user: fx.Node, demands: dict[fx.Node, dict[int, Demand]], bound: Bound) -> bool:
    """Of whatever it reads, along whatever dimension: all of its own result is read, and it is no slice."""
    if user.op != "call_function":
        return True
    if user in demands or isinstance(user.meta.get("val"), (list, tuple)):
        return False
    return not any(isinstance(relation, Window) for relation in bound(user)[1] or [])


def _read(
    user: fx.Node, node: fx.Node, dim: int, demands: dict[fx.Node, dict[int, Demand]], bound: Bound
) -> Demand | None:
    """Which rows of `node` along `dim` this user reads, None for all."""
    op, flow = bound(user)
    slots = [Slot(name, i, dim) for name, i, arg in op.tensors() if arg is node]
    if flow is None or not slots:
        return None
    wanted = [[demands.get(user, {})]]
    if isinstance(user.meta.get("val"), (list, tuple)):  # what is read of each result is read through its getitems
        wanted = [[demands.get(u, {}) for u in user.users if u.args[1] == i] for i in range(len(op.results))]
    return _together(_read_slot(op, flow, slot, wanted) for slot in slots)


def _read_slot(op: Op, flow: Flow, slot: Slot, wanted: list[list[dict[int, Demand]]]) -> Demand | None:
    """`wanted`: for each result what each of its readers reads."""
    size = op.shape(slot.name, slot.item)[slot.dim]
    reads: list[Demand | None] = []
    for relation in flow:
        if isinstance(relation, Link) and slot in relation.ins:
            if relation.kind is not Kind.EACH or len(relation.outs) != 1:
                return None
            (result, dim), *_ = relation.outs
            found = [each.get(dim) for each in wanted[result]]
            reads += found
        elif isinstance(relation, Window) and relation.source == slot:
            if not isinstance(relation.start, int) or not isinstance(relation.stop, int) or not isinstance(size, int):
                return None
            at_front, at_back = relation.stop, size - relation.start
            reads.append(Demand(at_front, 0) if at_front <= at_back else Demand(0, at_back))
        elif isinstance(relation, Reshape) and relation.name == slot.name:
            reads.append(_before_view(op, relation.name, slot.dim, wanted[0][0]))
    return _together(reads) if reads else None


def _causal_ends(demand: Demand) -> bool:
    """The first queries keep the causal mask as it is; the last query alone sees every key and needs none."""
    return demand.tail == 0 or (demand.head, demand.tail) == (0, 1)


def _before_view(op: Op, name: str, dim: int, wanted: dict[int, Demand]) -> Demand | None:
    """What is read along an input dimension of a view: [B N] -> [B*N] and back, or a dimension that stays."""
    shape = op.shape(name)
    split = refine(list(shape), op.out_shape(), [True] * len(shape)) or []
    holders = [place for place, factors in enumerate(split) if any(factor == dim for factor, _ in factors)]
    demand = wanted.get(holders[-1]) if holders else None
    if demand is None:
        return None
    sizes = [size for place in holders for _, size in split[place]]
    if not all(isinstance(size, int) for size in sizes) or split[holders[-1]][-1][0] != dim:
        return None
    *before, _ = sizes
    if len(holders) == 1:  # this dimension is the last factor of one that others may lead
        outer, rest = divmod(demand.outer, math.prod(before))
        return None if rest or not same(sizes[-1], shape[dim]) else Demand(demand.head, demand.tail, outer)
    if any(len(split[place]) > 1 for place in holders) or demand.outer > 1:
        return None
    return Demand(demand.head, demand.tail, math.prod(before))


def _through_view(op: Op, name: str, dim: int) -> int | None:
    """The output dimension that is exactly this input dimension, if the view leaves it whole."""
    shape = op.shape(name)
    split = refine(list(shape), op.out_shape(), [True] * len(shape))
    for place, factors in enumerate(split or []):
        if len(factors) == 1 and factors[0][0] == dim and same(factors[0][1], shape[dim]):
            return place
    return None


def _narrow(lift: Lift, node: fx.Node, dim: int, demand: Demand, axes: Axes, stages: dict[Any, Stage]) -> None:
    """Where the first op runs on fewer rows, leave them out of its input; everything behind it follows by itself."""
    op = Op(node)
    slots = _sources(op, dim)
    if slots is None:
        return
    inputs = [(slot, op.operand(slot.name, slot.item)) for slot in slots]
    if any(isinstance(v := lift.env[arg], Value) and v.staged for _, arg in inputs):
        return
    slot, source = next(((s, a) for s, a in inputs if not is_parameter(a)), inputs[0])
    value = lift.env[source]
    if not isinstance(value, Value) or sum(arg is source for _, _, arg in op.tensors()) > 1:
        return
    key = tuple(id(atom) for atom in axes.of(source)[slot.dim])
    length = value.shape[slot.dim]
    if key not in stages:
        head, tail = demand.head, demand.tail
        stages[key] = Stage(head + tail, Stage(length), Ends(head, tail), head=head, tail=tail)
    stage = stages[key]
    head, tail, d = stage.map.head, stage.map.tail, slot.dim

    def ends_of(x: torch.Tensor) -> torch.Tensor:
        parts = [aten.slice(x, d, 0, head)] if head else []
        parts += [aten.slice(x, d, length - tail)] if tail else []
        return torch.cat(parts, d) if len(parts) > 1 else parts[0]

    lift.redirect[source, node] = Value(lift.emit(ends_of, value.node), {d: (Rows(stage),)}, value.origin)


def _sources(op: Op, dim: int) -> list[Slot] | None:
    """The input dimensions that an output dimension runs over element by element."""
    for relation in flow_of(op) or []:
        if isinstance(relation, Link) and relation.kind is Kind.EACH and relation.outs == ((0, dim),):
            return list(relation.ins)
        if isinstance(relation, Reshape):
            for d in range(len(op.shape(relation.name))):
                if _through_view(op, relation.name, d) == dim:
                    return [Slot(relation.name, 0, d)]
    return None
