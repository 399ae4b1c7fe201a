"""What the last queries attend to, on CUDA: two passes over the keys, and W x N probabilities never exist.

The first pass leaves the logarithm of each row's softmax denominator, the second sums the probabilities of each key.
Importing this needs triton; `token_sparse.window_scores` is the plain form, which the tests compare it with.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["window_scores"]

ROWS, KEYS = 64, 64  # of one tile
SPLIT = 2048  # keys that one program of the first pass goes through: enough programs to fill a GPU


def window_scores(query: Tensor, key: Tensor, window: int, scale: float) -> Tensor:
    """[H N-W] the mean attention of the last `window` queries; float32 inside and out. query [H N D], key [G N D]."""
    heads, tokens, channels = query.shape
    copies, free = heads // key.shape[0], tokens - window
    width = max(triton.next_power_of_2(channels), 16)  # a tile's product has at least 16 columns
    splits = triton.cdiv(tokens, SPLIT)
    partial = torch.empty(heads, splits, window, dtype=torch.float32, device=query.device)
    sizes = (tokens, window, channels, copies, scale)
    strides = (*query.stride(), *key.stride())
    tiles: dict[str, Any] = {"WIDTH": width, "ROWS": ROWS, "KEYS": KEYS}
    _denominators[heads, splits, triton.cdiv(window, ROWS)](query, key, partial, *sizes, *strides, SPLIT=SPLIT, **tiles)
    normal = partial.logsumexp(1)  # [H W]
    score = torch.empty(heads, free, dtype=torch.float32, device=query.device)
    _means[heads, triton.cdiv(free, KEYS)](query, key, normal, score, *sizes, *strides, **tiles)
    return score


@triton.jit
def _tile(base, rows, stride_row, limit, stride_channel, channels, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a [N D] matrix; zeros where there are none."""
    column = tl.arange(0, WIDTH)
    inside = (rows < limit)[:, None] & (column < channels)[None, :]
    places = rows.to(tl.int64)[:, None] * stride_row + column[None, :] * stride_channel
    return tl.load(base + places, mask=inside, other=0.0)


@triton.jit
def _denominators(  # type: ignore[no-untyped-def]
    query, key, partial, tokens, window, channels, copies, scale,
    query_head, query_row, query_channel, key_head, key_row, key_channel,
    SPLIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """[H S W] log of the sum of exp(scores) of each row over one split of the keys."""
    head, split = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    place = tokens - window + row
    q = _tile(query + head.to(tl.int64) * query_head, place, query_row, tokens, query_channel, channels, WIDTH)
    own = key + (head // copies).to(tl.int64) * key_head
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(split * SPLIT, min(split * SPLIT + SPLIT, tokens), KEYS):
        column = start + tl.arange(0, KEYS)
        k = _tile(own, column, key_row, tokens, key_channel, channels, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((column[None, :] <= place[:, None]) & (column < tokens)[None, :], scores, -float("inf"))
        high = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(high == -float("inf"), 0.0, high)  # a row may see nothing of a split
        total = total * tl.exp(top - level) + tl.sum(tl.exp(scores - level[:, None]), 1)
        top = high
    found = tl.where(total > 0, tl.log(tl.where(total > 0, total, 1.0)) + top, -float("inf"))
    out = (head * tl.num_programs(1) + split).to(tl.int64) * window
    tl.store(partial + out + row, found, mask=row < window)


@triton.jit
def _means(  # type: ignore[no-untyped-def]
    query, key, normal, score, tokens, window, channels, copies, scale,
    query_head, query_row, query_channel, key_head, key_row, key_channel,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """[H N-W] the mean over the window's rows of exp(score - log of the denominator); all of them see these keys."""
    head, column = tl.program_id(0), tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    free = tokens - window
    own = key + (head // copies).to(tl.int64) * key_head
    k = _tile(own, column, key_row, free, key_channel, channels, WIDTH)
    total = tl.zeros([KEYS], tl.float32)
    for start in range(0, window, ROWS):
        row = start + tl.arange(0, ROWS)
        q = _tile(query + head.to(tl.int64) * query_head, free + row, query_row, tokens, query_channel, channels, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        level = tl.load(normal + head * window + row, mask=row < window, other=float("inf"))
        total += tl.sum(tl.exp(scores - level[:, None]), 0)
    tl.store(score + head.to(tl.int64) * free + column, total / window, mask=column < free)
