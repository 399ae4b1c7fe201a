"""Products with the weights of active neurons alone: `sparse_linear` and `gated_tail`, two operators.

Which neurons are active depends on the data, but results have static shapes: as operators they are one node of a graph,
compiled once, and on CUDA nothing waits for the device. On CPU for up to eight tokens C++ reads the rows of active
neurons once (neurons.cpp), on CUDA Triton does (neurons_triton.py), elsewhere torch's own operators. Both differentiate
as their masked definitions do. Liu et al., TEAL, arXiv 2408.14690; Lee et al., CATS, arXiv 2404.08763.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from tokred.backends.kernels.native import library

__all__ = ["TOKENS", "active", "gated_tail", "gated_tail_reference", "sparse_linear", "sparse_linear_reference"]

TOKENS = 8  # with more, hardly a neuron is active for none of them: the product is dense
WORK = 2**17  # products that are worth a second thread
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def active(x: Tensor, threshold: Tensor) -> Tensor:
    """`x` where |x| > threshold, 0 elsewhere: S_t(x). NaN stays. Compared in float32, or float64 if `x` is."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.where(wide.abs() <= threshold.to(wide.dtype), 0, x)


# -- definitions ------------------------------------------------------------------------------------------------------


def sparse_linear_reference(x: Tensor, weight_t: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    """What `sparse_linear` computes, by definition, in float64."""
    y = active(x, threshold).double() @ weight_t.double()
    return y if bias is None else y + bias.double()


def gated_tail_reference(
    act: Tensor,
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down_t: Tensor,
    down_bias: Tensor | None,
    threshold: Tensor,
) -> Tensor:
    """What `gated_tail` computes, by definition, in float64."""
    u = x.double() @ up.double().T + (0 if up_bias is None else up_bias.double())
    y = (active(act, threshold).double() * u) @ down_t.double()
    return y if down_bias is None else y + down_bias.double()


# -- on CPU -----------------------------------------------------------------------------------------------------------


@cache
def _native() -> Any:
    found = library("neurons")
    if found is None:
        return None
    function = found.tokred_neurons
    address, size = ctypes.c_void_p, ctypes.c_int64
    gate, up = (address, size, size, ctypes.c_double), (address, address, size, size, address)
    function.argtypes = (*gate, *up, address, size, size, address, address, ctypes.c_int32, ctypes.c_int32)
    function.restype = None
    return function


def _kernel(act: Tensor, *weights: Tensor) -> Any:
    """The function of neurons.cpp if it takes these: up to eight tokens, types that it knows, contiguous rows."""
    known = all(w.dtype in TYPES and w.stride(1) == 1 and w.numel() for w in weights)
    return _native() if known and 0 < act.numel() <= TOKENS * act.shape[-1] else None


def _launch(
    kernel: Any,
    act: Tensor,
    x: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
) -> Tensor:
    own, values, added, start = (None if v is None else v.float().contiguous() for v in (act, x, up_bias, bias))
    assert own is not None
    neurons, width = down.shape
    tokens = own.numel() // neurons
    y = torch.empty(*act.shape[:-1], width, dtype=torch.float32)
    channels, stride = (0, 0) if up is None else (up.shape[1], up.stride(0))
    threads = min(torch.get_num_threads(), 1 + tokens * neurons * (width + channels) // WORK)
    pointers = [None if v is None else v.data_ptr() for v in (own, values, up, added, down, start, y)]
    kernel(
        pointers[0], tokens, neurons, threshold.item(), pointers[1], pointers[2], stride, channels, pointers[3],
        pointers[4], down.stride(0), width, pointers[5], pointers[6], TYPES[down.dtype], threads,
    )  # fmt: skip
    return y.to(act.dtype)


def _product(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight_t + bias without C++: the zeros of few float32 tokens are skipped, a token split over the threads."""
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type != "cpu" or x.dtype != torch.float32 or not 0 < len(rows) <= TOKENS:
        y = x @ weight_t
        return y if bias is None else y + bias
    sums, parts = [], torch.arange(torch.get_num_threads())
    for row in rows:
        index = row.nonzero().squeeze(1)
        bags = parts * len(index) // len(parts)
        sums.append(embedding_bag(index, weight_t, bags, mode="sum", per_sample_weights=row[index]).sum(0))
    y = torch.stack(sums).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


# -- the operators ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("tokred::sparse_linear", mutates_args=())
def sparse_linear(x: Tensor, weight_t: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    """S_t(x) weight_t + bias, where S_t keeps |x| > t: weight rows that no token needs are not read. [.. D].

    x          [.. F]
    weight_t   [F D], of the type of `x`: the neuron-major copy of a linear's weight, see tokred.compiler.relaid
    bias       [D] or None
    threshold  one number, read when the operator runs; 0 leaves out exact zeros, as those of ReLU, and nothing else

    Sums are in float32, or float64 for float64. A weight that is infinite or NaN counts for active neurons alone.
    Raises ValueError for sizes or types that do not go together.
    """
    _check("sparse_linear", threshold, {"x": x, "weight_t": weight_t, "bias": bias}, weight_t.shape)
    if kernel := _kernel(x, weight_t):
        return _launch(kernel, x, None, None, None, weight_t, bias, threshold)
    return _product(active(x, threshold), weight_t, bias)


@torch.library.custom_op("tokred::gated_tail", mutates_args=())
def gated_tail(
    act: Tensor,
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down_t: Tensor,
    down_bias: Tensor | None,
    threshold: Tensor,
) -> Tensor:
    """The rest of a gated MLP behind its gate: (S_t(act) * (x up^T + up_bias)) down_t + down_bias, [.. D].

    act        [.. F], the gate behind its activation; S_t keeps |act| > t
    x          [.. C], what entered the MLP
    up         [F C], as nn.Linear has it; rows may lie apart, as half of a packed weight does
    up_bias    [F] or None
    down_t     [F D], the neuron-major copy of the last linear's weight
    down_bias  [D] or None
    threshold  one number, read when the operator runs

    Rows of `up` and `down_t` that no token needs are not read; nothing is rounded to a lower type on the way.
    Raises ValueError for sizes or types that do not go together.
    """
    tensors = {"act": act, "x": x, "up": up, "up_bias": up_bias, "down_t": down_t, "down_bias": down_bias}
    _check("gated_tail", threshold, tensors, down_t.shape)
    if kernel := _kernel(act, up, down_t):
        return _launch(kernel, act, x, up, up_bias, down_t, down_bias, threshold)
    return _product(active(act, threshold) * linear(x, up, up_bias), down_t, down_bias)


def _check(name: str, threshold: Tensor, tensors: dict[str, Tensor | None], down: torch.Size) -> None:
    """Kernels trust what they are given: what does not fit would read beside a tensor."""
    given = {key: tuple(v.shape) for key, v in tensors.items() if v is not None}
    first = next(iter(given))
    *lead, _ = given[first]
    wanted = {first: (*lead, down[0]), "bias": down[1:], "down_bias": down[1:], "up_bias": down[:1]}
    if "up" in given:
        wanted |= {"up": (down[0], given["x"][-1]), "x": (*lead, given["x"][-1])}
    wrong = {key: shape for key, shape in given.items() if shape != tuple(wanted.get(key, shape))}
    if wrong or len(down) != 2:
        raise ValueError(f"{name}: sizes do not go together: {given}")
    if threshold.numel() != 1:
        raise ValueError(f"{name}: the threshold is one number, this has {threshold.numel()}")
    if len(types := {v.dtype for v in tensors.values() if v is not None}) > 1:
        raise ValueError(f"{name}: tensors of several types: {', '.join(map(str, types))}")


@sparse_linear.register_fake
def _(x: Tensor, weight_t: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_t.shape[1]))


@gated_tail.register_fake
def _(
    act: Tensor,
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down_t: Tensor,
    down_bias: Tensor | None,
    threshold: Tensor,
) -> Tensor:
    return act.new_empty((*act.shape[:-1], down_t.shape[1]))


# -- gradients: of the masked definition, dense -----------------------------------------------------------------------


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sparse_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight_t, bias, threshold = ctx.saved_tensors
    by_x = active(x, threshold).ne(0) * (grad @ weight_t.T)
    by_weight = _flat(active(x, threshold)).T @ _flat(grad)
    return by_x, by_weight, None if bias is None else _flat(grad).sum(0), None


def _gated_tail_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    act, x, up, up_bias, down_t, down_bias, threshold = ctx.saved_tensors
    kept, u = active(act, threshold), linear(x, up, up_bias)
    by_hidden = grad @ down_t.T
    by_u = by_hidden * kept
    biases = [None if b is None else _flat(g).sum(0) for b, g in ((up_bias, by_u), (down_bias, grad))]
    by_down = _flat(kept * u).T @ _flat(grad)
    return by_hidden * u * kept.ne(0), by_u @ up, _flat(by_u).T @ _flat(x), biases[0], by_down, biases[1], None


sparse_linear.register_autograd(_sparse_linear_backward, setup_context=_keep)
gated_tail.register_autograd(_gated_tail_backward, setup_context=_keep)
