"""every_other: keep every second token, whatever it holds."""

from dataclasses import dataclass
from typing import Any

from tokred import Place, Reduction, Site, TokenMap, register
from tokred.errors import ArgumentError


@register("prune", "every_other")
@dataclass(frozen=True)
class EveryOther(Reduction):
    """Keep the unprotected tokens at even places, then those at odd places, until enough are kept. Order is kept.

    ratio    the fraction of unprotected tokens removed; at 0.5 exactly every other one goes
    layers   None is one cut, in the middle of the model
    """

    ratio: float = 0.5

    causal_safe = True

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ArgumentError(f"every_other(ratio={self.ratio!r}): the fraction removed must lie in [0, 1)")

    def default_layers(self, depth: int) -> list[int]:
        return [depth // 2]

    def removed(self, place: Place) -> Any:
        return place.free - place.count(1 - self.ratio)

    def plan(self, site: Site) -> TokenMap:
        place = site.arange(0, site.tokens) - site.head  # [B N] protected tokens are kept whatever their score
        score = -(place % 2) - place / (2 * site.tokens)  # no two are equal, so the choice is the same everywhere
        return site.keep_top(score, site.free - self.removed(site))
