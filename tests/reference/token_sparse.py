"""Token Sparse Attention by hand: one sample, one head, one query at a time, in the precision of its inputs.

Jo, Kang, Song, Kim, arXiv 2602.03216; the steps are those of the released code (dongwonjo/Token-Sparse-Attention), but
that the mass left out stays below `coverage`. Nothing here knows tokred.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["chosen", "token_sparse"]


def _row(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The softmax of one query over these keys."""
    scores = keys @ query * scale
    powers = (scores - scores.max()).exp()
    return powers / powers.sum()


def _smooth(values: list[float], kernel: int) -> list[float]:
    """The mean over `kernel` neighbours; what lies outside counts as zero."""
    half = kernel // 2
    return [sum(values[max(i - half, 0) : i + half + 1]) / kernel for i in range(len(values))]


def chosen(
    query: Tensor, key: Tensor, *, coverage: float, window: int, least: int, kernel: int, scale: float, grouped: bool
) -> list[list[int]]:
    """For each head the rows that attend, ascending. query [H N D], key [H N D]: keys are copied for each head."""
    heads, tokens, _ = query.shape
    free = tokens - window
    if coverage == 0 or free <= least:
        return [list(range(tokens))] * heads
    scores = []
    for head in range(heads):
        mean = [0.0] * free
        for row in range(free, tokens):
            weights = _row(query[head, row], key[head, : row + 1], scale)
            mean = [m + w / window for m, w in zip(mean, weights[:free].tolist(), strict=True)]
        scores.append(_smooth(mean, kernel))
    layer = [sum(column) / heads for column in zip(*scores, strict=True)]
    dropped, mass = 0, 0.0
    for value in sorted(layer):
        mass += value / sum(layer)
        if mass >= coverage:
            break
        dropped += 1
    count = max(least, free - dropped)
    if grouped:  # key heads are the runs of equal keys
        first = [next(h for h in range(heads) if torch.equal(key[h], key[head])) for head in range(heads)]
        members = {f: [scores[h] for h in range(heads) if first[h] == f] for f in first}
        scores = [[sum(column) for column in zip(*members[f], strict=True)] for f in first]
    best = [sorted(sorted(range(free), key=lambda i, s=own: -s[i])[:count]) for own in scores]
    return [rows + list(range(free, tokens)) for rows in best]


def token_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    *,
    coverage: float = 0.005,
    window: int = 128,
    least: int = 1024,
    kernel: int = 7,
    scale: float | None = None,
    grouped: bool = False,
) -> Tensor:
    """[B H N E]; query [B H N D], key [B G N D], value [B G N E], valid [B N] False for padding."""
    batch, heads, tokens, channels = query.shape
    scale = 1 / math.sqrt(channels) if scale is None else scale
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    out = torch.zeros(batch, heads, tokens, value.shape[-1], dtype=query.dtype)
    for sample in range(batch):
        real = list(range(tokens)) if valid is None else valid[sample].nonzero().squeeze(-1).tolist()
        q, k = query[sample][:, real], key[sample][:, real]
        options = {"coverage": coverage, "window": window, "least": least, "kernel": kernel}
        choice = chosen(q, k, **options, scale=scale, grouped=grouped)
        for head, rows in enumerate(choice):
            places = [real[row] for row in rows]
            for i, place in enumerate(places):
                weights = _row(query[sample, head, place], key[sample, head, places[: i + 1]], scale)
                seen = value[sample, head, places[: i + 1]]
                out[sample, head, place] = weights @ seen
    return out
