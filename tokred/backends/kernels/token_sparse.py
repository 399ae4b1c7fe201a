"""Token Sparse Attention as one operator: score, choose, gather, attend, scatter.

How many rows are chosen depends on the data, but the result is [B H N E] whatever they are: as one operator it has
static shapes, so Inductor, export and dynamic batches see nothing unusual. Jo, Kang, Song, Kim, arXiv 2602.03216.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, scaled_dot_product_attention

__all__ = ["choose_rows", "expected_rows", "token_sparse_attention", "unpadded", "window_scores"]

log = logging.getLogger("tokred")

BLOCK = 256  # rows of a mask that are compared at a time
OPTIONS = "float? scale, float coverage, int window, int least, int kernel, bool grouped"
TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? mask"


def expected_rows(tokens: int, window: int, least: int) -> int:
    """How many rows are taken to attend where nothing has run yet: half of those before the window, at least `least`.

    Half is what the paper's 3.23 times faster attention at 128K tokens comes to: (1 / 2)^2, and the overhead. It is no
    measurement: of the benchmark's synthetic input 80 % attend at 2K tokens, 71 % at 4K and 60 % at 16K.
    """
    free = tokens - window
    return tokens if free <= least else window + max(least, (free + 1) // 2)


# -- which rows -------------------------------------------------------------------------------------------------------


def window_scores(query: Tensor, key: Tensor, window: int, scale: float) -> Tensor:
    """[H N-W] what the last `window` queries attend to, on average, in float32 or better.

    query [H N D], key [G N D]; grouped keys are not expanded, and W x N scores exist for one of the groups at a time.
    The plain form of `token_sparse_triton.window_scores`.
    """
    groups, tokens, _ = key.shape
    recent = query[:, tokens - window :].unflatten(0, (groups, -1))  # [G H/G W D]
    later = torch.ones(window, window, dtype=torch.bool, device=query.device).triu(1)
    means = []
    for own, keys in zip(recent, key, strict=True):
        scores = _wide(own.flatten(0, 1)) @ _wide(keys).T * scale  # [H/G*W N]
        scores = scores.unflatten(0, (-1, window))
        scores[..., tokens - window :].masked_fill_(later, -torch.inf)
        means.append(scores.softmax(-1)[..., : tokens - window].mean(1))
    return torch.cat(means)


def choose_rows(
    query: Tensor, key: Tensor, scale: float, coverage: float, window: int, least: int, kernel: int, grouped: bool
) -> Tensor | None:
    """[S K] the rows that each head (S = H), or each key head if `grouped` (S = G), keeps, ascending; None: all stay.

    query [H N D], key [G N D] of one sample without padding.
    """
    tokens, free = query.shape[1], query.shape[1] - window
    if coverage <= 0 or free <= least:
        return None
    score = avg_pool1d(_scores(query, key, window, scale), kernel, 1, kernel // 2)  # [H N-W]
    layer = score.mean(0).double()
    dropped = (layer / layer.sum()).sort().values.cumsum(0)  # the mass that goes with the 1, 2, ... lowest
    kept = max(least, free - int((dropped < coverage).sum()))
    log.debug("token_sparse_attention: %d of %d rows", kept + window, tokens)
    if kept == free:
        return None
    if grouped:
        score = score.unflatten(0, (key.shape[0], -1)).mean(1)  # [G N-W]
    chosen = score.topk(kept, dim=-1, sorted=False).indices.sort(-1).values
    recent = torch.arange(free, tokens, device=chosen.device).expand(chosen.shape[0], -1)
    return torch.cat([chosen, recent], -1)


def unpadded(mask: Tensor) -> Tensor | None:
    """[B|1 N] which tokens are no padding, if `mask` hides later keys and padding and nothing else; otherwise None.

    mask   [B|1 1 N N], True or 0 where a key is seen. What the rows of padding see does not matter
    """
    mask = mask[(None,) * (4 - mask.dim())]
    if (mask.shape[1] > 1 and mask.stride(1)) or mask.shape[2] != mask.shape[3]:
        return None
    mask = mask[:, 0]
    last, own = (_seen(x) for x in (mask[:, -1], mask.diagonal(dim1=-2, dim2=-1)))
    valid = torch.where(last.any(-1, keepdim=True), last, own)  # [B N]; padding at the end may see nothing
    for sample, stray in zip(mask, own & ~valid, strict=True):  # rows of padding see everything, or not themselves:
        if stray.any() and not _seen(sample[stray]).all():  # these are another text of a packed batch
            return None
    for start in range(0, mask.shape[-1], BLOCK):
        rows = slice(start, start + BLOCK)
        causal = torch.ones_like(mask[0, rows], dtype=torch.bool).tril(start)  # [R N]
        for sample, real in zip(mask, valid, strict=True):
            shown, wanted = sample[rows], causal & real
            if not real[rows].all():
                shown, wanted = shown[real[rows]], wanted[real[rows]]
            if not torch.equal(_seen(shown), wanted) or not _is_plain(shown):
                return None
    return valid


def _seen(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _is_plain(mask: Tensor) -> bool:
    """Whether a mask says no more about a key than whether it is seen."""
    return mask.dtype == torch.bool or not bool(((mask != 0) & _seen(mask)).any())


def _scores(query: Tensor, key: Tensor, window: int, scale: float) -> Tensor:
    if query.is_cuda:
        from tokred.backends.kernels import token_sparse_triton

        return token_sparse_triton.window_scores(query, key, window, scale)
    return window_scores(query, key, window, scale)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# -- the attention ----------------------------------------------------------------------------------------------------


def _run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, *choice: Any) -> Tensor:
    valid = None if mask is None else unpadded(mask)
    if mask is not None and valid is None:
        log.warning("token_sparse_attention: the mask hides more than later keys and padding; attention stays dense")
        gqa = query.shape[1] != key.shape[1]
        return _laid_out(scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=gqa))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    out = _empty(query, value).zero_()
    for sample in range(query.shape[0]):
        q, k, v = query[sample], key[sample], value[sample]
        own = None if valid is None else valid[sample if valid.shape[0] > 1 else 0].nonzero().squeeze(-1)
        if own is None or own.shape[0] == q.shape[1]:
            rows = choose_rows(q.detach(), k.detach(), factor, *choice)
        elif own.shape[0]:
            rows = choose_rows(q.detach()[:, own], k.detach()[:, own], factor, *choice)
            rows = own.expand(k.shape[0], -1) if rows is None else own[rows]
        else:
            continue  # nothing but padding
        _attend(out[sample], q, k, v, rows, scale)
    return out


def _attend(out: Tensor, query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None, scale: float | None) -> None:
    """Causal attention among the rows [S K], or all, written to `out`; order is kept, so causality is too.

    out [H N E], query [H N D], key [G N D], value [G N E]
    """
    heads, groups = query.shape[0], key.shape[0]
    if rows is None:
        attended = _causal(query, key, value, scale)
        out.copy_(attended)
        return
    head = torch.arange(heads, device=rows.device).unsqueeze(-1)
    shared = torch.arange(rows.shape[0], device=rows.device).unsqueeze(-1) * groups // rows.shape[0]
    own = rows.repeat_interleave(heads // rows.shape[0], 0)  # [H K]
    attended = _causal(query[head, own], key[shared, rows], value[shared, rows], scale)
    out[head, own] = attended


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    gqa = query.shape[0] != key.shape[0]
    one = (query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0))
    return scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=gqa).squeeze(0)


def _empty(query: Tensor, value: Tensor) -> Tensor:
    """[B H N E], in memory [B N H E] as SDPA lays it out."""
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, value.shape[-1])).transpose(1, 2)


def _laid_out(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


# -- the operator -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("tokred::token_sparse_attention", mutates_args=(), schema=f"({TENSORS}, {OPTIONS}) -> Tensor")
def token_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    coverage: float,
    window: int,
    least: int,
    kernel: int,
    grouped: bool,
) -> Tensor:
    """Causal attention in which each head attends among the rows that matter to its last queries; zeros elsewhere.

    query     [B H N D]
    key       [B G N D], value [B G N E], G a divisor of H: grouped heads are not expanded
    mask      [B|1 1 N N], True or 0 where a key is seen: later keys and padding are hidden, and the rows of padding
              come back as zeros. A mask that hides anything else gives dense attention, and a warning in the log.
              None hides later keys
    scale     of q k^T; None is 1 / sqrt(D)
    coverage  attention mass that may be left out; 0 leaves nothing out
    window    how many of the last queries score the others; they always stay
    least     how many of the others stay, whatever they score
    kernel    over how many neighbours scores are averaged, odd
    grouped   whether the query heads of a key head choose together, so that gathered keys are not copied for each

    Returns [B H N E]. Each sample chooses for itself. The choice has no gradient; what was chosen has.
    """
    return _run(query, key, value, mask, scale, coverage, window, least, kernel, grouped)


@torch.library.custom_op(
    "tokred::token_sparse_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses again, the same rows, and differentiates the attention among them."""
    pull = torch.func.vjp(lambda q, k, v: _run(q, k, v, *rest), query, key, value)[1]
    by_query, by_key, by_value = pull(grad)
    return by_query, by_key, by_value


@token_sparse_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return _empty(query, value)


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in (query, key, value))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 7


token_sparse_attention.register_autograd(_differentiate, setup_context=_remember)
