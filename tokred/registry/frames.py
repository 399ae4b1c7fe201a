"""The base of methods that carry image tokens from one call of a model to the next: video, control loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokred.registry.method import Method

__all__ = ["FrameFusion", "Frames"]


@dataclass(frozen=True)
class Frames:
    """What a compiled graph keeps of its last call, for I images of P square patches.

    pixels    [I 3 H W]  as the vision encoder read them
    features  [I P C]    what the language model read, one token a patch
    relevance [I P]      how much the prompt's text looked at each, where the method asks for it
    patch                the side of a patch in pixels
    """

    pixels: Tensor
    features: Tensor
    relevance: Tensor | None
    patch: int


@dataclass(frozen=True, kw_only=True)
class FrameFusion(Method):
    """Other image tokens for the language model, made of those of this call and those of the call before.

    What is kept goes into the graph as inputs and comes out as results. Each compiled graph holds its own; it starts
    with nothing, and again with another number of images, after `restart`, or if another graph that was compiled with
    this very object was called in between.
    """

    _latest: ClassVar[object] = None

    def restart(self) -> None:
        """Forget all frames, as at the start of an episode: for every graph that was compiled with this very object."""
        object.__setattr__(self, "_latest", None)

    def follows(self, graph: object) -> bool:
        """Whether `graph` made the last call; from now on it did."""
        before = self._latest
        object.__setattr__(self, "_latest", graph)
        return before is graph

    def looks(self, depth: int) -> int | None:
        """The layer of the language model, from 0, whose attention is the relevance; None where it is not needed."""
        return None

    def fuse(self, pixels: Tensor, features: Tensor, before: Frames, step: Tensor) -> Tensor:
        """[I P C] what the language model reads for features [I P C] of pixels [I 3 H W]: plain code, traced.

        step   [] int64, the number of calls before this one since the start; at 0 all of `before` is zeros
        """
        raise NotImplementedError
