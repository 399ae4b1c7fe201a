"""The op rules of what only moves numbers: transposes, views, slices, concatenations, look-ups. See axis_rules.py.

Importing this module registers those rules, too.
"""

from __future__ import annotations

from typing import Any

import torch

from tokred.compiler.axis_rules import Relations
from tokred.compiler.relations import Flow, Join, Kind, Link, Op, Reshape, Slot, Window, each, einlinks, rule, same

__all__ = ["refine"]

aten = torch.ops.aten


@rule(aten.transpose.int, aten.swapaxes.default)
def transpose(op: Op) -> Flow:
    rank = len(op.shape("self"))
    i, j = op.number("dim0") % rank, op.number("dim1") % rank
    return each(op, {d: {i: j, j: i}.get(d, d) for d in range(rank)})  # [.. a .. b ..] -> [.. b .. a ..]


@rule(aten.t.default, aten.mT.default)
def t(op: Op) -> Flow:
    rank = len(op.shape("self"))
    return each(
        op, {d: d for d in range(rank - 2)} | ({rank - 2: rank - 1, rank - 1: rank - 2} if rank > 1 else {0: 0})
    )


@rule(aten.permute.default)
def permute(op: Op) -> Flow:
    rank = len(op.shape("self"))
    return each(op, {int(d) % rank: o for o, d in enumerate(op["dims"])})


@rule(aten.unsqueeze.default)
def unsqueeze(op: Op) -> Flow:
    rank = len(op.shape("self"))
    place = op.number("dim") % (rank + 1)
    return each(op, {i: i + (i >= place) for i in range(rank)})  # [a b] -> [a 1 b]


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(op: Op) -> Flow:
    shape = op.shape("self")
    dims: Any = op.arguments.get("dim", range(len(shape)))
    dims = [dims] if isinstance(dims, int) else dims
    gone = {d % len(shape) for d in dims if same(shape[d], 1)}
    kept = [i for i in range(len(shape)) if i not in gone]
    return each(op, {i: o for o, i in enumerate(kept)})  # [a 1 b] -> [a b]


@rule(aten.expand.default, aten.broadcast_to.default, aten.expand_as.default)
def expand(op: Op) -> Flow:
    return [*einlinks(op, {"self": "*"}, "*")]  # [1|a ..] -> [b .. a ..]


@rule(aten.repeat.default)
def repeat(op: Op) -> Flow:
    shape, out = op.shape("self"), op.out_shape()
    lead = len(out) - len(shape)
    return each(op, {i: i + lead for i in range(len(shape)) if same(shape[i], out[i + lead])})


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(op: Op) -> Flow:
    if op.arguments.get("dim") is None:
        return []
    return each(op, {i: i for i in range(len(op.shape("self"))) if i != op.dim()})


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int)
def view(op: Op) -> Flow:
    return [Reshape("self")]  # the common refinement of both shapes: [B*N C] -> [B N H D]


@rule(aten.slice.Tensor)
def slice_(op: Op) -> Flow:
    shape, along = op.shape("self"), op.dim()
    links: Relations = [*each(op, {i: i for i in range(len(shape)) if i != along})]
    start, stop = _bounds(op, shape[along])
    if same(op.number("step"), 1):
        links.append(_window(Slot("self", 0, along), start, stop, (0, along), shape[along]))
    return links


def _bounds(op: Op, size: Any) -> tuple[Any, Any]:
    start, stop = op.number("start"), op.number("end")
    start = 0 if start is None else start
    stop = size if stop is None else stop
    if isinstance(start, int) and start < 0:
        start = start + size
    if isinstance(stop, int) and stop < 0:
        stop = stop + size
    if isinstance(stop, int) and (stop >= 2**62 or (isinstance(size, int) and stop > size)):
        stop = size
    if isinstance(size, int) and isinstance(start, int) and isinstance(stop, int):
        start, stop = min(max(start, 0), size), max(stop, 0)
    return start, stop


def _window(source: Slot, start: Any, stop: Any, out: tuple[int, int], size: Any) -> Link | Window:
    if same(start, 0) and same(stop, size):
        return Link(Kind.EACH, (source,), (out,))
    return Window(source, start, stop, out)


@rule(aten.select.int)
def select(op: Op) -> Flow:
    shape, along = op.shape("self"), op.dim()
    index = op.number("index")
    if isinstance(index, int) and index < 0:
        index = index + shape[along]
    links: Relations = [*each(op, {i: i - (i > along) for i in range(len(shape)) if i != along})]
    return [*links, Window(Slot("self", 0, along), index, index + 1, None)]


@rule(aten.unbind.int)
def unbind(op: Op) -> Flow:
    shape, along = op.shape("self"), op.dim()
    links: Relations = []
    for r in range(len(op.results)):
        links += each(op, {i: i - (i > along) for i in range(len(shape)) if i != along}, result=r)
        links.append(Window(Slot("self", 0, along), r, r + 1, None))
    return links


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes)
def split(op: Op) -> Flow:
    shape, along = op.shape("self"), op.dim()
    links: Relations = []
    start: Any = 0
    for r in range(len(op.results)):
        stop = start + op.out_shape(r)[along]
        links += each(op, {i: i for i in range(len(shape)) if i != along}, result=r)
        links.append(_window(Slot("self", 0, along), start, stop, (r, along), shape[along]))
        start = stop
    return links


@rule(aten.cat.default)
def cat(op: Op) -> Flow:
    rank = len(op.out_shape())
    along = int(op.number("dim")) % rank
    parts = [(i, node) for _, i, node in op.tensors() if node.meta["val"].dim() == rank]  # an empty cache is rank one
    links: Relations = [
        Link(Kind.EACH, tuple(Slot("tensors", i, d) for i, _ in parts), ((0, d),)) for d in range(rank) if d != along
    ]
    return [*links, Join(tuple(Slot("tensors", i, along) for i, _ in parts), (0, along))]


@rule(aten.stack.default)
def stack(op: Op) -> Flow:
    rank = len(op.out_shape())
    place = int(op.number("dim")) % rank
    count = len(op["tensors"])
    return [
        Link(Kind.EACH, tuple(Slot("tensors", i, d) for i in range(count)), ((0, d + (d >= place)),))
        for d in range(rank - 1)
    ]


@rule(aten.embedding.default)
def embedding(op: Op) -> Flow:
    rank = len(op.shape("indices"))
    return [*each(op, {i: i for i in range(rank)}, "indices"), *each(op, {1: rank}, "weight")]  # [v c] [*] -> [* c]


@rule(aten.gather.default)
def gather(op: Op) -> Flow:
    along, rank = op.dim(), len(op.shape("self"))
    links: Relations = []
    for d in range(rank):
        slots = (Slot("index", 0, d),) if d == along else (Slot("self", 0, d), Slot("index", 0, d))
        if d == along or same(op.shape("self")[d], op.shape("index")[d]):
            links.append(Link(Kind.EACH, slots, ((0, d),)))
    return links


@rule(aten.index_select.default)
def index_select(op: Op) -> Flow:
    along = op.dim()
    links: Relations = [*each(op, {i: i for i in range(len(op.shape("self"))) if i != along})]
    return [*links, *each(op, {0: along}, "index")]


@rule(
    aten.masked_scatter.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.scatter.value,
    aten.scatter.src,
)
def scatter(op: Op) -> Flow:
    along = op.dim() if "dim" in op.arguments else None
    rank = len(op.shape("self"))
    if along is None:
        return []
    links: Relations = []
    for d in range(rank):
        if d == along:
            continue
        others = [Slot("self", 0, d)]
        if "src" in op.arguments and op.target is not aten.scatter.src:
            source = d - (op.target is aten.select_scatter.default and d > along)
            others.append(Slot("src", 0, source))
        links.append(Link(Kind.EACH, tuple(others), ((0, d),)))
    return links


@rule(aten.index.Tensor)
def index(op: Op) -> Flow:
    # x[:, i] with one 1-D index keeps the other dimensions; anything else is left to be mixed
    indices = op["indices"]
    used = [d for d, item in enumerate(indices) if item is not None]
    if len(used) != 1 or len(op.shape("indices", used[0])) != 1:
        return []
    links: Relations = [*each(op, {i: i for i in range(len(op.shape("self"))) if i != used[0]})]
    return links


def refine(sizes: list[Any], shape: tuple[Any, ...], loose: list[bool]) -> list[list[tuple[int, Any]]] | None:
    """Split a row-major list of factors among the dimensions of `shape`; None where a factor that is not loose is cut.

    Returns for each dimension the (factor, size) pairs it is made of, outermost first. Loose factors of size one are
    dropped; others of size one go to the first dimension that can hold them.
    """
    queue = [(i, size) for i, size in enumerate(sizes) if not (loose[i] and same(size, 1))]
    dims: list[list[tuple[int, Any]]] = []
    for need in shape:
        taken: list[tuple[int, Any]] = []
        if same(need, 1) and queue and same(queue[0][1], 1):
            taken.append(queue.pop(0))
        while not same(need, 1):
            if not queue:
                return None
            factor, size = queue.pop(0)
            if same(need, size):
                taken.append((factor, size))
                need = 1
            elif _divides(size, need):
                taken.append((factor, size))
                need = need // size
            elif loose[factor] and _divides(need, size):
                taken.append((factor, need))
                queue.insert(0, (factor, size // need))
                need = 1
            else:
                return None
        dims.append(taken)
    return dims if all(same(size, 1) for _, size in queue) else None


def _divides(small: Any, large: Any) -> bool:
    return same(large % small, 0)
