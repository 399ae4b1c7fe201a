"""Shapes and dtypes of what an op gives, without computing it: FakeTensor, by the shortest way that is right."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.utils import _pytree

__all__ = ["run_fake"]

UNKNOWN_SHAPE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def run_fake(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)` on fake tensors.

    FakeTensorMode spends milliseconds an op on symbols, devices and its cache. Where sizes are numbers and all tensors
    are on one device, as almost always in a rewrite, the op's meta kernel alone says the same.
    """
    leaves = [leaf for value in (*args, *kwargs.values()) for leaf in _parts(value)]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if _is_plain(func, kwargs, leaves, tensors):
        first: Any = tensors[0]
        try:
            with torch.no_grad(), in_kernel_invocation_manager(first.fake_mode):
                out = func(*args, **kwargs)
        except NotImplementedError:  # no meta kernel
            pass
        else:
            if isinstance(out, torch.Tensor):
                return _on_device(out, first)
            return _pytree.tree_map_only(torch.Tensor, lambda t: _on_device(t, first), out)
    with torch.no_grad(), enable_python_dispatcher(), detect_fake_mode(tensors) or nullcontext():
        return func(*args, **kwargs)


def _is_plain(func: Any, kwargs: dict[str, Any], leaves: list[Any], tensors: list[torch.Tensor]) -> bool:
    return (
        bool(tensors)
        and kwargs.get("device") is None
        and not any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves)
        and all(
            isinstance(t, FakeTensor)
            and t.constant is None
            and not t._has_symbolic_sizes_strides
            and t.fake_mode is tensors[0].fake_mode  # type: ignore[attr-defined]
            and t.fake_device == tensors[0].fake_device  # type: ignore[attr-defined]
            for t in tensors
        )
        and isinstance(func, torch._ops.OpOverload)
        and func.namespace == "aten"
        and not any(tag in func.tags for tag in UNKNOWN_SHAPE)
    )


def _parts(value: Any) -> Any:
    """An argument of an ATen op is a list at most, of no lists."""
    return value if isinstance(value, (list, tuple)) else (value,)


def _on_device(out: torch.Tensor, like: Any) -> torch.Tensor:
    return out if isinstance(out, FakeTensor) else FakeTensor(like.fake_mode, out, like.fake_device)
