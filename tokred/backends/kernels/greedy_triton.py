"""The Triton kernel of tokred::greedy_diverse: one program a sample, all steps inside. Importing this needs triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred.backends.kernels.greedy import NOTHING, OBJECTIVES, tie_width

__all__ = ["launch"]


@triton.jit
def _lowest_of_best(value, rows, width: tl.constexpr):  # type: ignore[no-untyped-def]
    best = tl.max(value, axis=0)
    enough = best - width * tl.maximum(tl.abs(best), 1.0)
    return tl.min(tl.where(value >= enough, rows, 2147483647), axis=0)


@triton.jit
def _stale(bound, known, rows, step, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row to choose, the row whose gain to compute anew before, and the step that the latter is exact at."""
    row = _lowest_of_best(bound, rows, width)
    top = _lowest_of_best(bound, rows, 0.0)
    at = tl.sum(tl.where(rows == top, known, 0), axis=0)
    stale = tl.where(at < step, top, row)
    return row, stale, tl.sum(tl.where(rows == stale, known, 0), axis=0)


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    table,  # [B N N] cosines
    score,  # [B N]
    ceiling,  # [B N] +inf, or far below every value for padding
    bound,  # [B N] for "cover": each row's gain when nothing is chosen
    first,  # [B]
    chosen,  # [B K], the result
    tokens,
    count,
    objective: tl.constexpr,
    nothing: tl.constexpr,
    has_first: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, block)
    real = rows < tokens
    table += sample * tokens * tokens
    weight = tl.load(score + sample * tokens + rows, mask=real, other=0.0)
    high = tl.load(ceiling + sample * tokens + rows, mask=real, other=float("-inf"))
    value = tl.load(bound + sample * tokens + rows, mask=real, other=float("-inf"))
    near = tl.full([block], nothing, weight.dtype)
    known = tl.where(high > 0, 0, count)  # the step that a row's gain is exact at
    for step in range(count):
        if objective == "cover":
            row, stale, at = _stale(value, known, rows, step, width)
            while at < step:
                similar = tl.load(table + stale.to(tl.int64) * tokens + rows, mask=real, other=0.0)
                gain = tl.sum(tl.maximum(similar - near, 0.0), axis=0)
                value = tl.where(rows == stale, gain + weight, value)
                known = tl.where(rows == stale, step, known)
                row, stale, at = _stale(value, known, rows, step, width)
        else:
            free = -near if objective == "sum" else weight * (1.0 - near)
            row = _lowest_of_best(tl.minimum(free, high), rows, width)
        if has_first:
            row = tl.where(step == 0, tl.load(first + sample).to(tl.int32), row)
        tl.store(chosen + sample * count + step, row.to(tl.int64))
        high = tl.where(rows == row, float("-inf"), high)
        value = tl.where(rows == row, float("-inf"), value)
        similar = tl.load(table + row.to(tl.int64) * tokens + rows, mask=real, other=0.0)
        near = near + similar if objective == "sum" else tl.maximum(near, similar)


def launch(table: Tensor, score: Tensor, ceiling: Tensor, count: int, objective: str, first: Tensor | None) -> Tensor:
    """[B count] rows in the order of choice, from similarities [B N N] and what `prepared` made of the arguments."""
    batch, tokens = score.shape
    chosen = torch.empty(batch, count, dtype=torch.int64, device=score.device)
    if not chosen.numel():
        return chosen
    assert objective in OBJECTIVES
    bound = torch.minimum(table.clamp(min=0).sum(-1) + score, ceiling) if objective == "cover" else score
    block = triton.next_power_of_2(tokens)
    _choose[(batch,)](
        table.contiguous(),
        score,
        ceiling,
        bound,
        score if first is None else first,
        chosen,
        tokens,
        count,
        objective=objective,
        nothing=NOTHING[objective],
        has_first=first is not None,
        width=tie_width(score.dtype),
        block=block,
        num_warps=min(max(block // 256, 1), 16),
    )
    return chosen
