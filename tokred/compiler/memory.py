"""What a compiled graph carries from call to call: more inputs, which are the last call's more results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokred.compiler.extras import Extra
from tokred.registry.frames import FrameFusion

__all__ = ["Memory"]

Kind = tuple[tuple[Any, ...], torch.dtype, torch.device]


class Memory(Extra):
    """Inputs that are what the results of the same number were in the call before. The method's `restart` ends it.

    kinds   for each its size, type and device; a size of None is the number of images
    images  the input, by its number, and its dimension that is as long as that; None where all sizes are fixed
    """

    def __init__(self, method: FrameFusion, kinds: Sequence[Kind], images: tuple[int, int] | None):
        self.method, self.kinds, self.images = method, tuple(kinds), images
        self.results = len(self.kinds)
        self.state: list[Tensor] = []

    def fresh(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Zeros: nothing was seen, at step 0."""
        number: Any = None if self.images is None else inputs[self.images[0]].shape[self.images[1]]
        return [
            torch.zeros([number if size is None else size for size in sizes], dtype=dtype, device=device)
            for sizes, dtype, device in self.kinds
        ]

    def give(self, inputs: Sequence[Any]) -> list[Tensor]:
        fresh = self.fresh(inputs)
        if not self.method.follows(self) or [x.shape for x in self.state] != [x.shape for x in fresh]:
            self.state = fresh
        return self.state

    def take(self, own: Sequence[Any], more: Sequence[Any]) -> None:
        self.state = [x.detach().clone() for x in more]  # a CUDA graph would write into its results again
