"""PyramidDrop: at a few depths, the image tokens that the last instruction token looks at least are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokred.registry.method import keep_fraction
from tokred.registry.register import register
from tokred.registry.site import Place, Site
from tokred.registry.visual import VisualCut


@register("prune", "pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(VisualCut):
    """At each of a few layers keep half of the visual tokens, ranked by the last token's attention in that very layer.

    Xing, Huang, Dong et al.: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
    Reduction", CVPR 2025, arXiv 2410.17247, section 3.2. As in the released code the layer's own norm and projections
    run on all tokens for the score. Positions persist; the released code numbers the remaining tokens anew.

    keep, ratio   fraction kept or removed at each cut; after the n-th, round(keep ** n x the first count) are left; 0.5
    layers        None is three cuts, a quarter, half and three quarters of the way: the paper's 8, 16, 24 of 32
    """

    keep: float | None = None
    ratio: float | None = None

    probe = "next"

    def __post_init__(self) -> None:
        keep_fraction(self.name, self.keep, self.ratio, 0.5)

    def default_layers(self, depth: int) -> list[int]:
        return sorted({depth // 4, depth // 2, 3 * depth // 4})

    def left(self, place: Place) -> Any:
        cuts = sum(self.acts_on(layer, place.depth, "") for layer in range(place.layer + 1))
        return round(keep_fraction(self.name, self.keep, self.ratio, 0.5) ** cuts * place.whole)

    def score(self, site: Site) -> Tensor:
        return site.attention(row=-1).mean(1)
