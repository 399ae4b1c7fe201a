"""Which index runs along each dimension of a tensor, through views and permutations.

Here position counts and size does not: the rows and the columns of a square score matrix are two different indices.
(The axis analysis answers another question: there the queries and the keys of self-attention are one token axis.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokred.compiler.capture import tensor_meta
from tokred.compiler.relations import Op, Size, same

__all__ = [
    "Dim",
    "Index",
    "Layout",
    "after",
    "arrange",
    "before",
    "expanded",
    "flat",
    "fresh",
    "leaves",
    "regroup",
    "reshaped",
    "resolve",
    "same_shape",
    "size_of",
    "spread",
]

aten = torch.ops.aten

# Same elements in the same order, another shape.
VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
}
SAME = {aten.clone.default, aten.contiguous.default, aten.alias.default, aten.lift_fresh_copy.default}
PERMUTES = {aten.permute.default, aten.transpose.int, aten.t.default}


@dataclass(eq=False)
class Index:
    """One index. `parts` once a view showed it to be a product of an outer and an inner one."""

    size: Size
    parts: tuple[Index, Index] | None = None


Dim = tuple[Index, ...]  # outermost factor first; () is a dimension of size one
Layout = tuple[Dim, ...]


def fresh(shape: Iterable[Size]) -> Layout:
    """A new index for each dimension that is not of size one."""
    return tuple(() if same(size, 1) else (Index(size),) for size in shape)


def leaves(dim: Iterable[Index]) -> Dim:
    out: list[Index] = []
    for index in dim:
        out += leaves(index.parts) if index.parts is not None else (index,)
    return tuple(out)


def resolve(layout: Layout) -> Layout:
    """The layout in terms of the indices that are not known to be products."""
    return tuple(leaves(dim) for dim in layout)


def flat(layout: Layout) -> Dim:
    return leaves(index for dim in layout for index in dim)


def regroup(indices: Dim, shape: Iterable[Size]) -> Layout | None:
    """The common refinement: [B*N C] -> [B N H D]. None where the sizes do not factor."""
    queue = list(reversed(leaves(indices)))
    layout: list[Dim] = []
    for size in shape:
        dim: list[Index] = []
        need = size
        while not same(need, 1):
            if not queue:
                return None
            index = queue.pop()
            if same(index.size, need):
                need = 1
            elif (rest := _quotient(need, index.size)) is not None:
                need = rest
            elif (rest := _quotient(index.size, need)) is not None:
                index.parts = (Index(need), Index(rest))
                queue.append(index.parts[1])
                index, need = index.parts[0], 1
            else:
                return None
            dim.append(index)
        layout.append(tuple(dim))
    return None if queue else tuple(layout)


def _quotient(a: Size, b: Size) -> Size | None:
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b > 0 and a > 0 and a % b == 0 else None
    quotient = a // b
    if not same(quotient * b, a) or same(quotient, 0):
        return None
    number = quotient.node.maybe_as_int() if isinstance(quotient, torch.SymInt) else quotient
    return quotient if number is None else number


def after(node: fx.Node, layout: Layout) -> Layout | None:
    """The layout of `node`'s result, given that of its first argument. None where `node` does more than rearrange."""
    meta, source = tensor_meta(node), tensor_meta(node.args[0]) if node.args else None
    if meta is None or source is None:
        return None
    if node.target in SAME:
        return layout
    if node.target in VIEWS:
        return regroup(flat(layout), meta.shape)
    if node.target in PERMUTES:
        return tuple(layout[d] for d in permutation(node, source.dim()))
    if node.target is aten.expand.default and same_shape(meta.shape, source.shape):
        return layout
    return None


def before(node: fx.Node, layout: Layout) -> Layout | None:
    """The layout of `node`'s first argument, given that of its result; indices that it made by copying are absent."""
    meta, source = tensor_meta(node), tensor_meta(node.args[0]) if node.args else None
    if meta is None or source is None:
        return None
    if node.target in SAME:
        return layout
    if node.target in VIEWS:
        return regroup(flat(layout), source.shape)
    if node.target in PERMUTES:
        order = permutation(node, source.dim())
        return tuple(layout[order.index(d)] for d in range(source.dim()))
    if node.target is aten.expand.default:
        own = layout[meta.dim() - source.dim() :]
        return tuple(() if same(size, 1) else dim for dim, size in zip(own, source.shape, strict=True))
    if node.target is aten.repeat_interleave.self_int:
        return _uncopied(node, source.shape, layout, copies_inside=True)
    if node.target is aten.repeat.default and meta.dim() == source.dim():
        return _untiled(layout, source.shape, Op(node)["repeats"])
    return None


def permutation(node: fx.Node, rank: int) -> list[int]:
    """Result dimension i is argument dimension permutation[i]."""
    op = Op(node)
    if node.target is aten.permute.default:
        return [int(d) % rank for d in op["dims"]]
    order = list(range(rank))
    if node.target is aten.transpose.int:
        i, j = int(op["dim0"]) % rank, int(op["dim1"]) % rank
        order[i], order[j] = j, i
    else:
        order.reverse()
    return order


def _uncopied(node: fx.Node, shape: torch.Size, layout: Layout, *, copies_inside: bool) -> Layout | None:
    """[.. H*G ..] -> [.. H ..] of repeat_interleave: each row is copied next to itself."""
    op = Op(node)
    if not isinstance(op["repeats"], int) or op["dim"] is None:
        return None
    d = int(op["dim"]) % len(shape)
    parts = regroup(layout[d], (shape[d], op["repeats"]))
    return None if parts is None else (*layout[:d], parts[0 if copies_inside else 1], *layout[d + 1 :])


def _untiled(layout: Layout, shape: torch.Size, repeats: Any) -> Layout | None:
    """[.. R*H ..] -> [.. H ..] of repeat: the whole dimension is copied after itself."""
    dims: list[Dim] = []
    for dim, size, count in zip(layout, shape, repeats, strict=True):
        parts = regroup(dim, (count, size)) if isinstance(count, int) else None
        if parts is None:
            return None
        dims.append(parts[1])
    return tuple(dims)


def same_shape(a: Iterable[Size], b: Iterable[Size]) -> bool:
    """Whether all sizes (or strides) are known to be equal, without adding a guard."""
    left, right = tuple(a), tuple(b)
    return len(left) == len(right) and all(same(x, y) for x, y in zip(left, right, strict=True))


# -- tensor code: traced into the graph --------------------------------------------------------------------------------


def arrange(x: torch.Tensor, layout: Layout, target: Layout) -> torch.Tensor:
    """`x`, whose dimensions run over `layout`, with dimensions `target`; what `x` lacks is expanded, unless a whole
    dimension lacks it, which then has size one."""
    layout, target = resolve(layout), resolve(target)
    have = set(flat(layout))
    wanted = [dim if any(index in have for index in dim) else () for dim in target]
    if [dim for dim in layout if dim] == [dim for dim in wanted if dim] and len(layout) == len(target):
        return reshaped(x, [size_of(dim) for dim in wanted])
    if all(dim in layout or not dim for dim in wanted) and {d for d in layout if d} == {d for d in wanted if d}:
        x = x.permute([layout.index(dim) for dim in wanted if dim] + [d for d, dim in enumerate(layout) if not dim])
        for _ in range(sum(not dim for dim in layout)):
            x = x.squeeze(-1)
        for d, dim in enumerate(wanted):
            x = x if dim else x.unsqueeze(d)
        return x
    order = tuple(index for dim in wanted for index in dim)
    x = expanded(spread(x, layout, order), [index.size for index in order])
    return reshaped(x, [size_of(dim) for dim in wanted])


def spread(x: torch.Tensor, layout: Layout, order: Dim) -> torch.Tensor:
    """`x` with one dimension for each index of `order`, of size one where `x` lacks it."""
    own = flat(layout)
    places = [own.index(index) for index in order if index in own]
    if places != sorted(places):
        x = reshaped(x, [index.size for index in own]).permute(places)
    return reshaped(x, [index.size if index in own else 1 for index in order])


def reshaped(x: torch.Tensor, shape: list[Size]) -> torch.Tensor:
    return x if same_shape(x.shape, shape) else x.reshape(shape)


def expanded(x: torch.Tensor, shape: list[Size]) -> torch.Tensor:
    return x if same_shape(x.shape, shape) else x.expand(shape)


def size_of(dim: Dim) -> Size:
    size: Size = 1
    for index in dim:
        size = size * index.size
    return size
