"""What attention gives to each key: column sums x^T A of an attention A that is never held as a matrix. One operator.

On CUDA two Triton kernels (column_sums_triton.py), elsewhere blocks of rows; `reference` says plainly what both do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["column_sums", "reference"]

ELEMENTS = 2**22  # of the attention that a block of rows holds at once


@torch.library.custom_op("tokred::column_sums", mutates_args=())
def column_sums(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    temperature: float,
    steps: int,
) -> Tensor:
    """x^T A, with A = softmax((q k^T scale + mask) / temperature) over the keys, in float32 or better: [B H M].

    query   [B H N D]
    key     [B G M D], G <= H: each is that of H / G heads
    weight  [B H N] is x
    mask    [B|1 H|1 N|1 M], boolean (True may be seen) or added to the scores; None hides nothing
    causal  row i sees no key behind i
    steps   that many times, each result the next weight (N = M): x^T A^steps, whose denominators are computed once

    A row that sees no key at all gives nothing to any. Raises ValueError for steps < 1, or steps > 1 with N != M.
    """
    if steps < 1 or (steps > 1 and query.shape[2] != key.shape[2]):
        raise ValueError(f"column_sums: {steps} steps over {query.shape[2]} rows and {key.shape[2]} keys")
    wide = _wide(query)
    x = weight.to(wide)
    if query.is_cuda:
        from tokred.backends.kernels.column_sums_triton import launch  # Triton comes with torch where there is CUDA

        result: Tensor = launch(query, key, x, mask, causal, scale, temperature, steps)
        return result
    batch, heads, tokens, keys = *query.shape[:3], key.shape[2]
    block = max(ELEMENTS // max(batch * heads * keys, 1), 1)
    normal = query.new_full((batch, heads, tokens), torch.inf, dtype=wide)
    for step in range(steps):
        total = x.new_zeros(batch, heads, keys)
        for start in range(0, tokens, block):
            rows = slice(start, min(start + block, tokens))
            scores = _scores(query, key, mask, causal, scale, temperature, rows)
            if step == 0:
                sums = scores.logsumexp(-1)
                normal[:, :, rows] = sums.masked_fill(sums == -torch.inf, torch.inf)
            share = (scores - normal[:, :, rows, None]).exp_()
            total += (x[:, :, rows].unsqueeze(2) @ share).squeeze(2)
        x = total
    return x


@column_sums.register_fake
def _(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1], key.shape[2]), dtype=_wide(query))


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float, temperature: float, rows: slice
) -> Tensor:
    """[B H R M] the scores of a few rows, hidden ones -inf; grouped keys are not expanded."""
    groups, keys = key.shape[1:3]
    part = query[:, :, rows].unflatten(1, (groups, -1)).flatten(2, 3)  # [B G H/G*R D]
    scores = (part.to(_wide(query)) @ key.to(_wide(query)).mT).reshape(*query.shape[:2], -1, keys) * scale
    if mask is not None:
        mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + hidden(mask)
    if causal:
        places = torch.arange(rows.start, rows.stop, device=query.device)
        later = torch.arange(keys, device=query.device) > places.unsqueeze(-1)
        scores = scores.masked_fill(later, -torch.inf)
    result: Tensor = scores / temperature
    return result


def hidden(mask: Tensor) -> Tensor:
    """An added mask, -inf where it hides: transformers writes the lowest finite number, which quotients blur."""
    return mask.masked_fill(mask < torch.finfo(mask.dtype).min / 2, -torch.inf)


def _wide(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def reference(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    temperature: float,
    steps: int,
) -> Tensor:
    """What `column_sums` computes, by definition: one sample and head at a time, the whole matrix, in float64."""
    result = torch.empty(*query.shape[:2], key.shape[2], dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            q, k = query[b, h].double(), key[b, h * key.shape[1] // query.shape[1]].double()
            logits = q @ k.T * scale
            if mask is not None:
                own = mask.expand(*query.shape[:3], key.shape[2])[b, h]
                added = torch.where(own, 0.0, -torch.inf) if own.dtype == torch.bool else own.double()
                logits = logits + (added if own.dtype == torch.bool else hidden(own).double())
            if causal:
                logits = logits + torch.full_like(logits, -torch.inf).triu(1)
            attention = (logits / temperature).softmax(-1).nan_to_num(0.0)
            result[b, h] = (
                weight[b, h].double() @ torch.linalg.matrix_power(attention, steps)
                if steps > 1
                else (weight[b, h].double() @ attention)
            )
    return result
