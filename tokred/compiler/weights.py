"""What a row weighs once it stands for several tokens: in attention (log size), and in means and sums over tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tokred.compiler.align import CannotAlign, Value
from tokred.compiler.graphs import times
from tokred.compiler.relations import Op
from tokred.compiler.staging import Advance, Batch, Factor, Plain, Rows, Stage, rows_of

if TYPE_CHECKING:
    from tokred.compiler.lift import Lift

__all__ = ["weigh_attention", "weigh_softmax", "weighted_mean"]

aten = torch.ops.aten


def _log_size(lift: Lift, stage: Stage) -> fx.Node:
    if "log_size" not in stage.cache:
        stage.cache["log_size"] = lift.emit(lambda size: size.clamp(min=1e-6).log(), stage.size)
    node: fx.Node = stage.cache["log_size"]
    return node


def _size_bias(lift: Lift, rows: Rows, lead: list[tuple[Factor, ...] | Any], like: fx.Node) -> fx.Node:
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
        merged.append(times(full))
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
        rows.stage.cache[key] = lift.emit(function, _log_size(lift, rows.stage))
    node: fx.Node = rows.stage.cache[key]
    return node


def weigh_attention(
    lift: Lift, op: Op, ready: dict[tuple[str, int], Value], nodes: dict[tuple[str, int], fx.Node]
) -> None:
    """Proportional attention: merged keys weigh as many as they are (ToMe, equation 1)."""
    key = ready["key", 0]
    rank = len(key.shape)
    rows = next((f for d, _, f in rows_of(key.layout) if d == rank - 2), None)
    if rows is None or not rows.stage.prop_attn or rows.stage.size is None:
        return
    if op.arguments.get("is_causal"):
        raise CannotAlign("causal attention takes no size bias")
    bias = _size_bias(lift, rows, [key.layout.get(d) for d in range(rank - 2)], nodes["query", 0])
    old = nodes.get(("attn_mask", 0))
    query = nodes["query", 0].meta["val"]

    def with_bias(bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        bias = bias.unsqueeze(-2)
        if mask is None:
            return bias
        return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else (mask + bias).to(query.dtype)

    nodes["attn_mask", 0] = lift.emit(with_bias, bias, old)


def weigh_softmax(
    lift: Lift, ready: dict[tuple[str, int], Value], nodes: dict[tuple[str, int], fx.Node], rows: Rows
) -> None:
    if not rows.stage.prop_attn or rows.stage.size is None:
        return
    value = ready["self", 0]
    dim = next(d for d, _, f in rows_of(value.layout) if f is rows or f == rows)
    rank = len(value.shape)
    lead = [value.layout.get(d) if d != dim and not _has_rows(value.layout.get(d)) else None for d in range(rank)]
    lead = lead[:dim] + lead[dim + 1 :]
    bias = _size_bias(lift, rows, lead, value.node)
    nodes["self", 0] = lift.emit(lambda x, b: x + b.movedim(-1, dim), value.node, bias)


def weighted_mean(lift: Lift, op: Op, ready: dict[tuple[str, int], Value], step: Advance) -> Any:
    """Mean (or sum) over tokens is that over the restored tokens; over kept ones where some are gone for good."""
    rows = step.weighted_mean
    assert rows is not None
    ((key, value),) = ready.items()
    if rows.stage.parent is None:  # all tokens are back
        return lift.call(op, {key: value.node}, step.outs)
    if any(not stage.map.restorable for stage in rows.stage.chain[1:]):
        if op.target not in (aten.mean.dim, aten.mean.default):
            raise CannotAlign(f"{op.target} over tokens of which some were dropped")
        return lift.call(op, {key: value.node}, step.outs)
    dim = next(d for d, _, f in rows_of(value.layout) if f == rows)
    weight = _pulled(lift, rows)
    lead = [value.layout.get(d) for d in range(len(value.shape)) if d != dim]
    if any(isinstance(f, tuple) and len(f) != 1 for f in lead):
        raise CannotAlign(f"{op.target} over tokens in an unusual layout")
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
        raise CannotAlign(f"{op.target} over several dimensions")
    return lift.checked(op, lift.emit(function, value.node, weight), step.outs)


def _pulled(lift: Lift, rows: Rows) -> fx.Node:
    """[B K] for how many original rows each row of the stage stands when tokens are restored."""
    weight: fx.Node | None = None
    for stage in rows.stage.chain[1:]:
        key = ("pulled", rows.lo, rows.hi)
        if key not in stage.cache:
            before, length = weight, stage.parent.length  # type: ignore[union-attr]

            def function(m: Any, w: torch.Tensor | None, length: Any = length) -> torch.Tensor:
                part = m.window(rows.lo, rows.hi, length) if rows.lo or rows.hi else m
                pulled: torch.Tensor = part.pull(part.ones(length - rows.lo - rows.hi) if w is None else w)
                return pulled

            stage.cache[key] = lift.emit(function, stage.map, before)
        weight = stage.cache[key]
    assert weight is not None
    return weight


def _has_rows(factors: tuple[Factor, ...] | None) -> bool:
    return factors is not None and any(isinstance(f, Rows) for f in factors)
