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


def _few(x: Tensor) -> bool:
    return 0 < x.numel() <= TOKENS * x.shape[-1]


def _kernel(act: Tensor, *weights: Tensor) -> Any:
    """The function of neurons.cpp if it takes these: up to eight tokens, types that it knows, contiguous rows."""
    known = all(w.dtype in TYPES and w.stride(1) == 1 and w.numel() for w in weights)
    return _native() if known and act.device.type == "cpu" and _few(act) else None


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
    y = torch.empty((*act.shape[:-1], width), dtype=torch.float32)
    channels, stride = (0, 0) if up is None else (up.shape[1], up.stride(0))
    threads = min(torch.get_num_threads(), 1 + tokens * neurons * (width + channels) // WORK)
    kernel(
        own.data_ptr(), tokens, neurons, threshold.item(),
        None if values is None else values.data_ptr(), None if up is None else up.data_ptr(), stride, channels,
        None if added is None else added.data_ptr(), down.data_ptr(), down.stride(0), width,
        None if start is None else start.data_ptr(), y.data_ptr(), TYPES[down.dtype], threads,
    )  # fmt: skip
    return y if act.dtype == torch.float32 else y.to(act.dtype)


def _product(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight_t + bias without C++: the zeros of few float32 tokens are skipped, a token split over the threads."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not _few(x):
        y = x @ weight_t
        return y if bias is None else y + bias
    sums, parts = [], torch.arange(torch.get_num_threads())
    for row in x.reshape(-1, x.shape[-1]):
        index = row.nonzero().squeeze(1)
        bags = parts * len(index) // len(parts)
        sums.append(embedding_bag(index, weight_t, bags, mode="sum", per_sample_weights=row[index]).sum(0))
    y = torch.stack(sums).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


# -- the operators ----------------------------------------------------------------------------------------------------


def _triton(act: Tensor) -> Any:
    """The module of Triton kernels if it takes these: up to eight tokens on CUDA. It comes with torch there."""
    if act.device.type != "cuda" or not _few(act):
        return None
    from tokred.backends.kernels import neurons_triton

    return neurons_triton


def _sparse_linear(x: Tensor, weight_t: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    _check("sparse_linear", x, weight_t, bias, threshold)
    if triton := _triton(x):
        y: Tensor = triton.sparse_linear(x, weight_t, bias, threshold)
        return y.to(x.dtype)
    if kernel := _kernel(x, weight_t):
        return _launch(kernel, x, None, None, None, weight_t, bias, threshold)
    return _product(active(x, threshold), weight_t, bias)


def _gated_tail(
    act: Tensor,
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down_t: Tensor,
    down_bias: Tensor | None,
    threshold: Tensor,
) -> Tensor:
    _check("gated_tail", act, down_t, down_bias, threshold)
    _check_up(act, x, up, up_bias)
    if triton := _triton(act):
        y: Tensor = triton.gated_tail(act, x, up, up_bias, down_t, down_bias, threshold)
        return y.to(act.dtype)
    if kernel := _kernel(act, up, down_t):
        return _launch(kernel, act, x, up, up_bias, down_t, down_bias, threshold)
    return _product(active(act, threshold) * linear(x, up, up_bias), down_t, down_bias)


def _check(name: str, act: Tensor, down: Tensor, bias: Tensor | None, threshold: Tensor) -> None:
    """Kernels trust what they are given: with sizes that do not fit they would read beside a tensor."""
    fits = down.dim() == 2 and act.shape[-1:] == down.shape[:1] and (bias is None or bias.shape == down.shape[1:])
    if not fits or threshold.numel() != 1 or act.dtype != down.dtype or (bias is not None and bias.dtype != act.dtype):
        given = [f"{tuple(v.shape)} {v.dtype}" for v in (act, down, bias, threshold) if v is not None]
        raise ValueError(f"{name}: [.. F], [F D], bias [D] and a single threshold, of one type, not {', '.join(given)}")


def _check_up(act: Tensor, x: Tensor, up: Tensor, bias: Tensor | None) -> None:
    fits = up.shape == (act.shape[-1], x.shape[-1]) and x.shape[:-1] == act.shape[:-1]
    one = act.dtype == x.dtype == up.dtype and (bias is None or bias.dtype == act.dtype)
    if not fits or not one or (bias is not None and bias.shape != up.shape[:1]):
        given = [f"{tuple(v.shape)} {v.dtype}" for v in (act, x, up, bias) if v is not None]
        raise ValueError(f"gated_tail: [.. F], [.. C], [F C] and bias [F], of one type, not {', '.join(given)}")


# Not custom_op: what that adds to each call, 20 microseconds here, is a twentieth of a decoding step of a small model.
_library = torch.library.Library("tokred", "FRAGMENT")
_SCHEMAS = {
    "sparse_linear": "(Tensor x, Tensor weight_t, Tensor? bias, Tensor threshold) -> Tensor",
    "gated_tail": "(Tensor act, Tensor x, Tensor up, Tensor? up_bias, Tensor down_t, Tensor? down_bias, "
    "Tensor threshold) -> Tensor",
}
for _name, _function in (("sparse_linear", _sparse_linear), ("gated_tail", _gated_tail)):
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _library.impl(_name, _function, "CompositeExplicitAutograd")

sparse_linear = torch.ops.tokred.sparse_linear.default
"""S_t(x) weight_t + bias, where S_t keeps |x| > t: weight rows that no token needs are not read. [.. D].

    x          [.. F]
    weight_t   [F D]: the neuron-major copy of a linear's weight, see tokred.compiler.relaid
    bias       [D] or None
    threshold  one number, read when the operator runs; 0 leaves out exact zeros, as those of ReLU, and nothing else

All of one type but the threshold. Sums are in float32, or float64 for float64. A weight that is infinite or NaN counts
where some token needs its neuron. Raises ValueError for sizes or types that do not go together.
"""

gated_tail = torch.ops.tokred.gated_tail.default
"""The rest of a gated MLP behind its gate: (S_t(act) * (x up^T + up_bias)) down_t + down_bias, [.. D].

    act        [.. F], the gate behind its activation; S_t keeps |act| > t
    x          [.. C], what entered the MLP
    up         [F C], as nn.Linear has it; rows may lie apart, as half of a packed weight does
    up_bias    [F] or None
    down_t     [F D], the neuron-major copy of the last linear's weight
    down_bias  [D] or None
    threshold  one number, read when the operator runs

Rows of `up` and `down_t` that no token needs are not read; nothing is rounded to a lower type on the way.
All of one type but the threshold. Raises ValueError for sizes or types that do not go together.
"""


@torch.library.register_fake("tokred::sparse_linear", lib=_library)
def _(x: Tensor, weight_t: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    _check("sparse_linear", x, weight_t, bias, threshold)
    return x.new_empty((*x.shape[:-1], weight_t.shape[1]))


@torch.library.register_fake("tokred::gated_tail", lib=_library)
def _(act: Tensor, x: Tensor, up: Tensor, up_bias: Any, down_t: Tensor, down_bias: Any, threshold: Tensor) -> Tensor:
    _check("gated_tail", act, down_t, down_bias, threshold)
    _check_up(act, x, up, up_bias)
    return act.new_empty((*act.shape[:-1], down_t.shape[1]))


# -- gradients: of the masked definition, dense -----------------------------------------------------------------------


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sparse_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight_t, bias, threshold = ctx.saved_tensors
    kept = active(x, threshold)
    by_x = torch.where(kept.ne(0), grad @ weight_t.T, 0)
    by_weight = _flat(kept).T @ _flat(grad)
    return by_x, by_weight, None if bias is None else _flat(grad).sum(0), None


def _gated_tail_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    act, x, up, up_bias, down_t, down_bias, threshold = ctx.saved_tensors
    kept, u = active(act, threshold), linear(x, up, up_bias)
    by_hidden = grad @ down_t.T
    by_u = by_hidden * kept
    biases = [None if b is None else _flat(g).sum(0) for b, g in ((up_bias, by_u), (down_bias, grad))]
    by_down = _flat(kept * u).T @ _flat(grad)
    return (
        torch.where(kept.ne(0), by_hidden * u, 0),
        by_u @ up,
        _flat(by_u).T @ _flat(x),
        biases[0],
        by_down,
        biases[1],
        None,
    )


for _name, _backward in (("sparse_linear", _sparse_linear_backward), ("gated_tail", _gated_tail_backward)):
    torch.library.register_autograd(f"tokred::{_name}", _backward, setup_context=_keep, lib=_library)
