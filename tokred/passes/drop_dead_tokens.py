"""Token liveness: dead-code elimination along the token axis.

A classifier that reads only the class token needs, in its last block, one query row, one output row and one MLP row.
The demand runs backwards through the op rules (which rows of this value does anyone read?), then the graph is lifted
with the rows that nobody reads left out. The same numbers, less work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokred.compiler.align import Value
from tokred.compiler.axes import Axes
from tokred.compiler.axis_rules import refine
from tokred.compiler.capture import is_parameter, source_line, tensor_meta
from tokred.compiler.lift import Lift
from tokred.compiler.relations import Kind, Link, Op, Reshape, Slot, Window, flow_of, same
from tokred.compiler.staging import Rows, Stage
from tokred.registry.ends import Ends

__all__ = ["drop_dead_tokens"]

aten = torch.ops.aten

SDPA = torch.ops.aten.scaled_dot_product_attention.default

Demand = tuple[int, int]  # rows read at the front and at the back
WORTH = {torch.ops.aten.linear.default, torch.ops.aten.addmm.default, torch.ops.aten.matmul.default, SDPA}


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
                _narrow(lift, node, dim, demand, axes, stages)
        lift.visit(node)
    if lift.restored:
        where = next(iter(lift.restored))
        raise ValueError(f"{where.name} needs the rows that nobody reads: {lift.restored[where][0]}")
    for node, wanted in demands.items():
        if node.target in WORTH:
            (head, tail), *_ = wanted.values()
            log.append(f"{node.name}: {head + tail} of its rows are read ({source_line(node)})")
    return lift.finish(full=True)


def _demands(gm: fx.GraphModule) -> dict[fx.Node, dict[int, Demand]]:
    """For each tensor, the dimensions of which only a few rows at the ends are read; others are read whole."""
    demands: dict[fx.Node, dict[int, Demand]] = {}
    for node in reversed(gm.graph.nodes):
        meta = tensor_meta(node)
        if meta is None or node.op != "call_function" or not node.users:
            continue
        wanted: dict[int, Demand] = {}
        for dim, size in enumerate(meta.shape):
            reads = [_read(user, node, dim, demands) for user in node.users]
            if any(read is None for read in reads):
                continue
            head, tail = max(r[0] for r in reads if r), max(r[1] for r in reads if r)
            if isinstance(size, int) and 0 < 2 * (head + tail) <= size:
                wanted[dim] = (head, tail)
        if len(wanted) == 1:
            demands[node] = wanted
    return demands


def _read(user: fx.Node, node: fx.Node, dim: int, demands: dict[fx.Node, dict[int, Demand]]) -> Demand | None:
    """Which rows of `node` along `dim` this user reads, None for all."""
    if user.op != "call_function" or isinstance(user.meta.get("val"), (list, tuple)):
        return None
    op = Op(user)
    flow = flow_of(op)
    slots = [Slot(name, i, dim) for name, i, arg in op.tensors() if arg is node]
    if flow is None or not slots:
        return None
    wanted = demands.get(user, {})
    head = tail = 0
    for slot in slots:
        read = _read_slot(op, flow, slot, wanted)
        if read is None:
            return None
        head, tail = max(head, read[0]), max(tail, read[1])
    return head, tail


def _read_slot(op: Op, flow: Any, slot: Slot, wanted: dict[int, Demand]) -> Demand | None:
    size = op.shape(slot.name, slot.index)[slot.dim]
    for relation in flow:
        if isinstance(relation, Link) and slot in relation.ins:
            if relation.kind is not Kind.EACH:
                return None
            found = [wanted.get(dim) for _, dim in relation.outs]
            if len(found) != 1 or (
                op.target is SDPA and op["is_causal"] and found[0] is not None and not _causal_ends(found[0])
            ):
                return None
            return found[0]
        if isinstance(relation, Window) and relation.source == slot:
            if not isinstance(relation.start, int) or not isinstance(relation.stop, int) or not isinstance(size, int):
                return None
            at_front, at_back = relation.stop, size - relation.start
            return (at_front, 0) if at_front <= at_back else (0, at_back)
        if isinstance(relation, Reshape) and relation.name == slot.name:
            place = _through_view(op, relation.name, slot.dim)
            return None if place is None else wanted.get(place)
    return None


def _causal_ends(demand: Demand) -> bool:
    """The first queries keep the causal mask as it is; the last query alone sees every key and needs none."""
    return demand[1] == 0 or demand == (0, 1)


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
    inputs = [(slot, op.operand(slot.name, slot.index)) for slot in slots]
    if any(isinstance(v := lift.env[arg], Value) and v.staged for _, arg in inputs):
        return
    slot, source = next(((s, a) for s, a in inputs if not is_parameter(a)), inputs[0])
    value = lift.env[source]
    if not isinstance(value, Value) or sum(arg is source for _, _, arg in op.tensors()) > 1:
        return
    key = tuple(id(atom) for atom in axes.of(source)[slot.dim])
    length = value.shape[slot.dim]
    if key not in stages:
        ends = Ends(demand[0], demand[1])
        stages[key] = Stage(sum(demand), Stage(length), ends, head=demand[0], tail=demand[1])
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
