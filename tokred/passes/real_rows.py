"""The real rows of a padded batch: from values with all rows, [.. B .. N ..], to these, [.. 1 .. T ..], and back.

Which rows are real is known at run time: three more inputs of the graph say it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import _constrain_range_for_size

from tokred.compiler.axes import Dim
from tokred.compiler.record import record
from tokred.compiler.staging import Batch, Factor, Layout, Plain, Rows, Stage, extent
from tokred.compiler.work import sizes_now

__all__ = ["RealRows", "extent_of", "is_grid", "layout_of"]


def layout_of(dims: list[Dim], batch: Dim, tokens: Dim, stage: Stage) -> Layout:
    """Which factors of which dimensions are the samples and the tokens."""
    layout: Layout = {}
    for d, atoms in enumerate(dims):
        factors: list[Factor] = []
        place = 0
        while place < len(atoms):
            if atoms[place : place + len(batch)] == batch:
                factors.append(Batch(stage, extent_of(batch)))
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


def extent_of(dim: Dim) -> Any:
    size: Any = 1
    for atom in dim:
        size = size * atom.size
    return size


def is_grid(layout: Layout) -> bool:
    """One factor of samples and one of whole tokens: a value with a row for each."""
    factors = [factor for dim in layout.values() for factor in dim]
    rows = [factor for factor in factors if isinstance(factor, Rows)]
    return len(rows) == 1 and rows[0].lo == rows[0].hi == 0 and sum(isinstance(f, Batch) for f in factors) == 1


class RealRows:
    """Three inputs behind those of `graph`, and what turns its values from all rows to the real ones and back.

    rows    [T] the numbers, in B*N, of the real rows; T is a size that nothing may be concluded from
    mask    [B N] whether a row is real
    place   [B N] which of the real rows it is (any, where it is none)
    copied  bytes that packing and unpacking read and write, if all rows are real
    """

    def __init__(self, graph: fx.Graph, batch: Any, tokens: Any, like: Any):
        self.graph, self.copied = graph, 0.0
        mode, env = like.fake_mode, like.fake_mode.shape_env
        with env.ignore_fresh_unbacked_symbols(), mode:
            count = env.create_unbacked_symint()
            _constrain_range_for_size(count, 2)
            options: Any = {"dtype": torch.int64, "device": like.device}
            values = {
                "packed_rows": torch.empty(count, **options),
                "packed_mask": torch.empty(batch, tokens, dtype=torch.bool, device=like.device),
                "packed_place": torch.empty(batch, tokens, **options),
            }
        self.count = values["packed_rows"].shape[0]
        nodes = [self.graph.placeholder(name) for name in values]
        for node, value in zip(nodes, values.values(), strict=True):
            node.meta["val"] = value
        self.rows, self.mask, self.place = nodes

    def shape(self, shape: tuple[Any, ...], layout: Layout) -> list[Any]:
        """The sizes of a packed value: samples are one, tokens are T."""
        sizes, count = list(shape), {Batch: 1, Rows: self.count}
        for dim, factors in layout.items():
            sizes[dim] = extent(tuple(f if isinstance(f, Plain) else Plain(count[type(f)]) for f in factors))
        return sizes

    def gather(self, full: fx.Node, layout: Layout) -> fx.Node:
        """[.. B .. N ..] -> [.. 1 .. T ..]"""
        self.copied += 2 * _nbytes(full)
        split, order = _factorised(layout, tuple(full.meta["val"].shape))
        shape = self.shape(tuple(full.meta["val"].shape), layout)

        def take(x: Tensor, rows: Tensor, place: Tensor) -> Tensor:
            x = x.reshape(split).permute(order).flatten(0, 1).index_select(0, rows)  # [B*N ..] -> [T ..]
            return x.unsqueeze(0).permute(_inverse(order)).reshape(shape)

        node: fx.Node = record(self.graph, take, (full, self.rows, self.place))
        return node

    def scatter(self, packed: fx.Node, layout: Layout, shape: tuple[Any, ...]) -> fx.Node:
        """[.. 1 .. T ..] -> [.. B .. N ..], zeros where there is no row"""
        split, order = _factorised(layout, shape)
        short = [self.count if i == order[1] else 1 if i == order[0] else size for i, size in enumerate(split)]

        def put(x: Tensor, rows: Tensor, place: Tensor, mask: Tensor) -> Tensor:
            x = x.reshape(short).permute(order).flatten(0, 1)  # [T ..]
            x = x.index_select(0, place.flatten()).unflatten(0, place.shape)  # [B N ..]
            x = torch.where(mask.reshape(tuple(mask.shape) + (1,) * (x.dim() - 2)), x, x.new_zeros(()))
            return x.permute(_inverse(order)).reshape(shape)

        full: fx.Node = record(self.graph, put, (packed, self.rows, self.place, self.mask))
        self.copied += 2 * _nbytes(full)
        return full

    def pick(self, full: fx.Node, dim: int, other: int | None) -> fx.Node:
        """[.. N ..] -> [.. T ..] of what has one row for each token, the same for all samples; with the dimension
        `other` that the tokens are to run along, [B .. 1 ..] -> [1 .. T ..] of what has one for each sample.
        """

        def take(x: Tensor, rows: Tensor, place: Tensor) -> Tensor:
            if other is None:
                return x.index_select(dim, rows % place.shape[1])
            return x.index_select(dim, rows // place.shape[1]).transpose(dim, other)

        node: fx.Node = record(self.graph, take, (full, self.rows, self.place))
        return node


def _nbytes(node: fx.Node) -> float:
    """Of a tensor as large as it was when the graph was traced."""
    meta = node.meta["val"]
    return float(math.prod(sizes_now(node)) * meta.element_size())


def _factorised(layout: Layout, shape: tuple[Any, ...]) -> tuple[list[Any], list[int]]:
    """The sizes of all factors, and the order that puts samples and tokens in front."""
    factors = [factor for dim, size in enumerate(shape) for factor in layout.get(dim, (Plain(size),))]
    first = [i for i, factor in enumerate(factors) if isinstance(factor, Batch)]
    first += [i for i, factor in enumerate(factors) if isinstance(factor, Rows)]
    return [extent((factor,)) for factor in factors], first + [i for i in range(len(factors)) if i not in first]


def _inverse(order: list[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]
