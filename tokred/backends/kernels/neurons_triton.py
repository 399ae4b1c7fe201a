"""The Triton kernels of tokred::sparse_linear and tokred::gated_tail. Imported where launched.

Neurons that no token needs are masked out of the loads, so nothing is counted, compacted or waited for: a launch can
be recorded in a CUDA graph. Programs write sums of their own, added up afterwards: no atomic additions, one result.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gated_tail", "sparse_linear"]

PROGRAMS = 512  # of one launch, where there is that much to do: a few for each multiprocessor of a large GPU


@triton.jit
def _activity(  # type: ignore[no-untyped-def]
    act, threshold, neuron, end, neurons, tokens, given: tl.constexpr, wide: tl.constexpr, batch: tl.constexpr
):
    """[M F] the values that count, zeros elsewhere, and [F] whether any does; NaN does."""
    token = tl.arange(0, batch)
    limit = tl.load(threshold).to(wide) if given else 0.0
    inside = (token < tokens)[:, None] & (neuron < end)[None, :]
    value = tl.load(act + token[:, None] * neurons + neuron[None, :], mask=inside, other=0.0).to(wide)
    off = (tl.abs(value) <= limit) | (inside == 0)
    return tl.where(off, 0.0, value), tl.max(tl.where(off, 0, 1), axis=0) > 0


@triton.jit
def _down(  # type: ignore[no-untyped-def]
    act, weight, threshold, partial, tokens, neurons, width, stride, share,
    given: tl.constexpr, wide: tl.constexpr, batch: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """[S M D] what each share of the neurons adds to each output."""
    token, column = tl.arange(0, batch), tl.program_id(0) * columns + tl.arange(0, columns)
    total = tl.zeros([batch, columns], wide)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, neurons)
    for start in range(first, end, rows):
        neuron = start + tl.arange(0, rows)
        value, needed = _activity(act, threshold, neuron, end, neurons, tokens, given, wide, batch)
        places = neuron.to(tl.int64)[:, None] * stride + column[None, :]
        weights = tl.load(weight + places, mask=needed[:, None] & (column < width)[None, :], other=0.0).to(wide)
        total += tl.sum(value[:, :, None] * weights[None, :, :], axis=1)
    places = (tl.program_id(1) * tokens + token).to(tl.int64)[:, None] * width + column[None, :]
    tl.store(partial + places, total, mask=(token < tokens)[:, None] & (column < width)[None, :])


@triton.jit
def _hidden(  # type: ignore[no-untyped-def]
    act, x, up, bias, threshold, hidden, tokens, neurons, channels, stride,
    biased: tl.constexpr, wide: tl.constexpr, batch: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """[M F] act * (x up^T + bias) of active neurons, zeros elsewhere."""
    token, neuron = tl.arange(0, batch), tl.program_id(0) * rows + tl.arange(0, rows)
    value, needed = _activity(act, threshold, neuron, neurons, neurons, tokens, True, wide, batch)
    total = tl.zeros([batch, rows], wide)
    end = tl.max(needed.to(tl.int32), axis=0) * channels  # a tile without an active neuron reads nothing
    for start in range(0, end, columns):
        channel = start + tl.arange(0, columns)
        places = neuron.to(tl.int64)[:, None] * stride + channel[None, :]
        weights = tl.load(up + places, mask=needed[:, None] & (channel < channels)[None, :], other=0.0).to(wide)
        inside = (token < tokens)[:, None] & (channel < channels)[None, :]
        values = tl.load(x + token[:, None] * channels + channel[None, :], mask=inside, other=0.0).to(wide)
        total += tl.sum(values[:, None, :] * weights[None, :, :], axis=2)
    if biased:
        total += tl.load(bias + neuron, mask=neuron < neurons, other=0.0).to(wide)[None, :]
    product = tl.where(value == 0, 0.0, value * total)  # no NaN from an infinite product that does not count
    places = token[:, None] * neurons + neuron[None, :]
    tl.store(hidden + places, product, mask=(token < tokens)[:, None] & (neuron < neurons)[None, :])


def sparse_linear(x: Tensor, weight_t: Tensor, bias: Tensor | None, threshold: Tensor | None) -> Tensor:
    """The arguments and the result of the operator, for a few tokens; `threshold` None is 0."""
    act, weight_t = x.reshape(-1, x.shape[-1]).contiguous(), _with_rows(weight_t)
    (tokens, neurons), width = act.shape, weight_t.shape[1]
    settings = _settings(x.dtype, tokens)
    blocks = triton.cdiv(width, settings["columns"])
    share = triton.cdiv(triton.cdiv(neurons, max(PROGRAMS // blocks, 1)), settings["rows"]) * settings["rows"]
    shares = triton.cdiv(neurons, share)
    partial = x.new_empty((shares, tokens, width), dtype=_wide(x.dtype))
    _down[blocks, shares](
        act, weight_t, act if threshold is None else threshold.to(x.device), partial, tokens, neurons, width,
        weight_t.stride(0), share, given=threshold is not None, **settings,
    )  # fmt: skip
    y = partial.sum(0)
    return (y if bias is None else y + bias).view(*x.shape[:-1], width)


def gated_tail(
    act: Tensor, x: Tensor, up: Tensor, up_bias: Tensor | None, down_t: Tensor, down_bias: Tensor | None,
    threshold: Tensor,
) -> Tensor:  # fmt: skip
    """The arguments and the result of the operator, for a few tokens."""
    own, values, up = (
        act.reshape(-1, act.shape[-1]).contiguous(),
        x.reshape(-1, x.shape[-1]).contiguous(),
        _with_rows(up),
    )
    tokens, neurons = own.shape
    hidden = act.new_empty((tokens, neurons), dtype=_wide(act.dtype))
    settings = _settings(act.dtype, tokens)
    _hidden[(triton.cdiv(neurons, settings["rows"]),)](
        own, values, up, own if up_bias is None else up_bias, threshold.to(act.device), hidden, tokens, neurons,
        values.shape[1], up.stride(0), biased=up_bias is not None, **settings,
    )  # fmt: skip
    return sparse_linear(hidden, down_t, down_bias, None).view(*act.shape[:-1], -1)


def _settings(dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    """A tile of all tokens' products stays in registers."""
    batch = triton.next_power_of_2(tokens)
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    return {"wide": wide, "batch": batch, "rows": 32 if batch < 4 else 16, "columns": 128 // min(batch, 4)}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _with_rows(weight: Tensor) -> Tensor:
    """Rows may lie apart, the elements of a row may not."""
    return weight if weight.stride(1) == 1 else weight.contiguous()
