"""The common part of methods that drop image tokens on their way through a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tokred.errors import ArgumentError
from tokred.registry.maps import TokenMap, rows
from tokred.registry.method import Reduction, check_int, keep_fraction
from tokred.registry.site import Place, Site

__all__ = ["DiverseCut", "Staircase", "VisualCut"]


@dataclass(frozen=True)
class VisualCut(Reduction):
    """Keep the visual tokens with the highest score among what enters a layer; text and padding always stay.

    Kept tokens keep their order and their positions (rotary tables and masks are gathered), so the rest of the model
    sees exactly what it would see if the others were masked out as keys from this layer on.
    """

    needs: ClassVar[tuple[str, ...]] = ("visual", "queries")
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
        count = min(self.left(site), site.free)
        return site.keep_top(self.score(site) if count else site.members(), count)


@dataclass(frozen=True)
class Staircase(VisualCut):
    """A share of the first number of visual tokens is left from each of a few layers on.

    keep     those shares, rounded to tokens; one number is the same as a list of it
    layers   the layers, ascending, as many as `keep` has; None spreads the method's own (`paper`, of a model with
             `paper_depth` layers) over the model
    """

    keep: list[float] | tuple[float, ...] | float = 1.0

    paper: ClassVar[tuple[int, ...]] = ()
    paper_depth: ClassVar[int] = 32
    earliest: ClassVar[int] = 1  # scores come from the layer before

    def __post_init__(self) -> None:
        numbers = all(type(share) in (int, float) and 0 <= share <= 1 for share in self.shares)
        if not self.shares or not numbers or not self.descends(list(self.shares)):
            raise ArgumentError(f"{self.name}(keep={self.keep!r}): {self.wanted}")
        if self.layers is None and len(self.shares) > len(self.paper):
            raise ArgumentError(f"{self.name}(keep={self.keep!r}): say in which layers; there are {len(self.paper)}")
        if self.layers is not None:
            given = list(self.layers) if isinstance(self.layers, (list, tuple)) else [self.layers]
            ints = all(type(layer) is int and layer >= 0 for layer in given)
            if not ints or sorted(set(given)) != given or len(given) != len(self.shares):
                shown = f"{self.name}(keep={self.keep!r}, layers={self.layers!r})"
                raise ArgumentError(f"{shown}: as many layers as keep has fractions, ascending from 0")

    wanted: ClassVar[str] = "fractions in [0, 1] that do not grow from cut to cut"

    def descends(self, shares: list[float]) -> bool:
        """Whether the shares are as the method wants them, which else raises what `wanted` says."""
        return shares == sorted(shares, reverse=True)

    @property
    def shares(self) -> tuple[float, ...]:
        """`keep`, one number a cut."""
        return (self.keep,) if isinstance(self.keep, (int, float)) else tuple(self.keep)

    def steps(self, depth: int) -> list[int]:
        """The layer of each share; in a model with few layers several may meet, and the last counts."""
        if self.layers is not None:
            return list(self.layers) if isinstance(self.layers, (list, tuple)) else [int(self.layers)]
        spread = [round(layer * depth / self.paper_depth) for layer in self.paper[: len(self.shares)]]
        return [min(max(layer, self.earliest), depth - 1) for layer in spread]

    def default_layers(self, depth: int) -> list[int]:
        return sorted(set(self.steps(depth)))

    def share(self, layer: int, depth: int) -> float:
        """The share of the visual tokens that this layer runs on."""
        reached = [share for step, share in zip(self.steps(depth), self.shares, strict=True) if step <= layer]
        return reached[-1] if reached else 1.0

    def left(self, place: Place) -> Any:
        return round(self.share(place.layer, place.depth) * place.whole)


@dataclass(frozen=True)
class DiverseCut(VisualCut):
    """Keep visual tokens that differ from each other, chosen one by one among what enters a layer.

    layer         the first layer that runs on fewer tokens, from 0; 0
    keep, ratio   fraction of the visual tokens kept or removed; kept are the nearest whole number, and at least one
    """

    layer: int = 0
    keep: float | None = None
    ratio: float | None = None

    default_keep: ClassVar[float] = 0.1

    needs: ClassVar[tuple[str, ...]] = ("visual",)
    probe = "next"  # no attention is looked at, so layer 0 will do

    def __post_init__(self) -> None:
        check_int(self.name, "layer", self.layer, 0)
        keep_fraction(self.name, self.keep, self.ratio, self.default_keep)

    @property
    def kept(self) -> float:
        """The fraction kept, however it was given."""
        return keep_fraction(self.name, self.keep, self.ratio, self.default_keep)

    def default_layers(self, depth: int) -> list[int]:
        return [self.layer]

    def left(self, place: Place) -> Any:
        return max(round(self.kept * place.free), 1)

    def choose(self, site: Site, tokens: Tensor, among: Tensor | None, count: Any) -> Tensor:
        """[B count] which of the visual tokens [B V C] stay; `among` [B V] is False for padding."""
        raise NotImplementedError

    def plan(self, site: Site) -> TokenMap:
        places = site.candidates()
        among = None if site.valid is None else site.valid.expand(site.batch, -1).gather(1, places)
        count = min(self.left(site), site.free)
        return site.keep_candidates(self.choose(site, rows(site.hidden, places), among, count))
