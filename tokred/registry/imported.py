"""Trained weights that a method's option brings along: a safetensors file, or tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tokred.errors import ArgumentError

__all__ = ["imported"]


def imported(method: str, option: str, given: Any, wanted: str) -> tuple[str, Mapping[str, Tensor]]:
    """How to show it, and the tensors. Raises ArgumentError, which says what is `wanted`, for what is neither."""
    if isinstance(given, (str, Path)):
        try:
            from safetensors.torch import load_file

            return repr(str(given)), load_file(given)
        except ImportError:
            raise ArgumentError(f"{method}({option}={str(given)!r}): install safetensors to read it") from None
        except Exception as error:
            raise ArgumentError(f"{method}({option}={str(given)!r}): {type(error).__name__}: {error}") from None
    if isinstance(given, Mapping) and all(isinstance(tensor, Tensor) for tensor in given.values()):
        return "{...}", given
    raise ArgumentError(f"{method}({option}={given!r}): {wanted}")
