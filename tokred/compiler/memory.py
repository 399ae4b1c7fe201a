"""What a compiled graph carries from call to call: more inputs, which are the last call's more results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokred.registry.frames import FrameFusion

__all__ = ["Memory", "carrying"]


@dataclass(frozen=True)
class Memory:
    """The last `kinds` of a graph's inputs are what the results behind its first `own` ones were in the call before.

    kinds   for each its size, type and device; a size of None is the number of images
    images  the input, by its number, and its dimension that is as long as that; None where all sizes are fixed
    own     how many results are the model's
    """

    method: FrameFusion
    kinds: tuple[tuple[tuple[Any, ...], torch.dtype, torch.device], ...]
    images: tuple[int, int] | None
    own: int

    def fresh(self, inputs: tuple[Any, ...]) -> list[Tensor]:
        """Zeros: nothing was seen, at step 0."""
        number: Any = None if self.images is None else inputs[self.images[0]].shape[self.images[1]]
        return [
            torch.zeros([number if size is None else size for size in sizes], dtype=dtype, device=device)
            for sizes, dtype, device in self.kinds
        ]

    def split(self, results: Any) -> tuple[tuple[Any, ...], list[Tensor], tuple[Any, ...]]:
        """The model's results, what is carried, and what stands behind it."""
        after = self.own + len(self.kinds)
        return tuple(results[: self.own]), list(results[self.own : after]), tuple(results[after:])


def carrying(compiled: Callable[..., Any], memory: Memory) -> Callable[..., Any]:
    """`compiled` as the model's own graph is called. The state is this callable's; its method's `restart` ends it."""
    state: list[Tensor] = []
    own_graph = object()

    def call(*inputs: Any) -> Any:
        nonlocal state
        fresh = memory.fresh(inputs)
        if not memory.method.follows(own_graph) or [x.shape for x in state] != [x.shape for x in fresh]:
            state = fresh
        own, carried, _ = memory.split(compiled(*inputs, *state))
        state = [x.detach().clone() for x in carried]  # a CUDA graph would write into its results again
        return own

    return call
