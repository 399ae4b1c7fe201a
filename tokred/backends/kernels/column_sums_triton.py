"""The Triton kernels of tokred::column_sums: denominators of rows, then sums of columns. Imported where launched.

Scores are computed in both passes and kept in neither. No atomic additions: a result does not depend on the order in
which programs run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch"]

ROWS, KEYS = 64, 64  # of one tile


@triton.jit
def _rows(base, rows, limit, stride_row, stride_channel, channels, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a [N D] matrix; zeros where there are none."""
    column = tl.arange(0, width)
    places = rows.to(tl.int64)[:, None] * stride_row + column[None, :] * stride_channel
    return tl.load(base + places, mask=(rows < limit)[:, None] & (column < channels)[None, :], other=0.0)


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    q, k, row, column, tokens, keys, mask, mask_row, mask_column, scale, temperature,
    kind: tl.constexpr, lowest: tl.constexpr, causal: tl.constexpr, wide: tl.constexpr, cast: tl.constexpr,
):  # fmt: skip
    """[R M] scores of one tile; -inf where there are none, or hidden ones."""
    if wide == tl.float64:
        scores = tl.sum(q.to(wide)[:, None, :] * k.to(wide)[None, :, :], axis=2) * scale
    else:
        if cast:
            q, k = q.to(wide), k.to(wide)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    inside = (row < tokens)[:, None] & (column < keys)[None, :]
    if kind != 0:
        places = row.to(tl.int64)[:, None] * mask_row + column.to(tl.int64)[None, :] * mask_column
        seen = tl.load(mask + places, mask=inside, other=0)
        if kind == 1:
            inside = inside & (seen != 0)
        else:
            added = seen.to(wide)
            inside = inside & (added >= lowest)
            scores += added
    if causal:
        inside = inside & (row[:, None] >= column[None, :])
    return tl.where(inside, scores / temperature, float("-inf"))


@triton.jit
def _denominators(  # type: ignore[no-untyped-def]
    query, key, mask, normal, tokens, keys, channels, heads, copies, scale, temperature,
    query_batch, query_head, query_row, query_channel, key_batch, key_head, key_row, key_channel,
    mask_batch, mask_head, mask_row, mask_column,
    kind: tl.constexpr, lowest: tl.constexpr, causal: tl.constexpr, wide: tl.constexpr, cast: tl.constexpr,
    width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """[B H N] the logarithm of each row's softmax denominator, +inf for a row that sees nothing."""
    sample, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    query += sample * query_batch + head * query_head
    key += sample * key_batch + head // copies * key_head
    mask += sample * mask_batch + head * mask_head
    q = _rows(query, row, tokens, query_row, query_channel, channels, width)
    top = tl.full([rows], float("-inf"), wide)
    total = tl.full([rows], 0.0, wide)
    last = tl.minimum((tl.program_id(0) + 1) * rows, keys) if causal else keys
    for start in range(0, last, columns):
        column = start + tl.arange(0, columns)
        k = _rows(key, column, keys, key_row, key_channel, channels, width)
        scores = _tile(q, k, row, column, tokens, keys, mask, mask_row, mask_column, scale, temperature,
                       kind, lowest, causal, wide, cast)  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(scores - base[:, None]), axis=1)
        top = higher
    result = tl.where(total > 0, tl.where(total > 0, top, 0.0) + tl.log(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(normal + tl.program_id(1).to(tl.int64) * tokens + row, result, mask=row < tokens)


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    query, key, mask, normal, weight, result, tokens, keys, channels, heads, copies, scale, temperature,
    query_batch, query_head, query_row, query_channel, key_batch, key_head, key_row, key_channel,
    mask_batch, mask_head, mask_row, mask_column,
    kind: tl.constexpr, lowest: tl.constexpr, causal: tl.constexpr, wide: tl.constexpr, cast: tl.constexpr,
    width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """[B H M] the sum over rows of weight times exp(score - denominator)."""
    sample, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    query += sample * query_batch + head * query_head
    key += sample * key_batch + head // copies * key_head
    mask += sample * mask_batch + head * mask_head
    k = _rows(key, column, keys, key_row, key_channel, channels, width)
    total = tl.full([columns], 0.0, wide)
    first = tl.program_id(0) * columns // rows * rows if causal else 0
    for start in range(first, tokens, rows):
        row = start + tl.arange(0, rows)
        q = _rows(query, row, tokens, query_row, query_channel, channels, width)
        scores = _tile(q, k, row, column, tokens, keys, mask, mask_row, mask_column, scale, temperature,
                       kind, lowest, causal, wide, cast)  # fmt: skip
        place = tl.program_id(1).to(tl.int64) * tokens + row
        own = tl.load(normal + place, mask=row < tokens, other=float("inf"))
        x = tl.load(weight + place, mask=row < tokens, other=0.0)
        total += tl.sum(x[:, None] * tl.exp(scores - own[:, None]), axis=0)
    tl.store(result + tl.program_id(1).to(tl.int64) * keys + column, total, mask=column < keys)


def launch(
    query: Tensor, key: Tensor, weight: Tensor, mask: Tensor | None, causal: bool, scale: float, temperature: float,
    steps: int,
) -> Tensor:  # fmt: skip
    """The arguments and the result of `column_sums`; weight has the result's type."""
    batch, heads, tokens, channels = query.shape
    keys, wide = key.shape[2], weight.dtype
    kind, lowest, seen = 0, 0.0, query  # without a mask any address serves
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        lowest = 0.0 if kind == 1 else torch.finfo(mask.dtype).min / 2
        seen = (mask.view(torch.uint8) if kind == 1 else mask).expand(batch, heads, tokens, keys)
        strides = seen.stride()
    small = wide == torch.float64  # whose tiles are no tensor cores' work
    tiles: dict[str, Any] = {"rows": 16 if small else ROWS, "columns": 16 if small else KEYS}
    shared: tuple[Any, ...] = (tokens, keys, channels, heads, heads // key.shape[1], scale, temperature)
    shared += (*query.stride(), *key.stride(), *strides)
    tiles |= {"kind": kind, "lowest": lowest, "causal": causal, "wide": tl.float64 if small else tl.float32}
    # The interpreter keeps bfloat16 as bits and would multiply those.
    tiles |= {"cast": triton.knobs.runtime.interpret, "width": max(triton.next_power_of_2(channels), 16)}
    normal = torch.empty(batch, heads, tokens, dtype=wide, device=query.device)
    _denominators[triton.cdiv(tokens, tiles["rows"]), batch * heads](query, key, seen, normal, *shared, **tiles)
    x = weight.contiguous()
    for _ in range(steps):
        result = torch.empty(batch, heads, keys, dtype=wide, device=query.device)
        _sums[triton.cdiv(keys, tiles["columns"]), batch * heads](query, key, seen, normal, x, result, *shared, **tiles)
        x = result
    return x
