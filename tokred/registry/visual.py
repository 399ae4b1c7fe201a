"""The common part of methods that drop image tokens on their way through a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokred.registry.maps import TokenMap
from tokred.registry.method import Reduction
from tokred.registry.site import Place, Site

__all__ = ["VisualCut"]


@dataclass(frozen=True)
class VisualCut(Reduction):
    """Keep the visual tokens with the highest score among what enters a layer; text and padding always stay.

    Kept tokens keep their order and their positions (rotary tables and masks are gathered), so the rest of the model
    sees exactly what it would see if the others were masked out as keys from this layer on.
    """

    needs = ("visual", "queries")
    scope = "layer"
    causal_safe = True

    def left(self, place: Place) -> Any:
        """How many visual tokens of each sample stay at this place."""
        raise NotImplementedError

    def score(self, site: Site) -> Tensor:
        """[B N] what the visual tokens are ranked by."""
        raise NotImplementedError

    def removed(self, place: Place) -> Any:
        return place.free - min(self.left(place), place.free)

    def plan(self, site: Site) -> TokenMap:
        return site.keep_top(self.score(site), min(self.left(site), site.free))
