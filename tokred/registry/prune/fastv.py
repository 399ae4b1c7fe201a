"""FastV: image tokens that the last token does not look at in an early layer are dropped from the next one on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokred.registry.method import check_int, keep_fraction
from tokred.registry.register import register
from tokred.registry.site import Place, Site
from tokred.registry.visual import VisualCut


@register("prune", "fastv")
@dataclass(frozen=True)
class FastV(VisualCut):
    """Drop the visual tokens that the prompt's last token attends to least, once, before one layer.

    Chen, Zhao, Liu, Zhou, Li, Zhou, Chang: "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764,
    section 4. As in the released code the score is the attention of the last row, mean over heads, in the layer before.

    layer         the first layer that runs on fewer tokens, from 0; 2
    keep, ratio   fraction of the visual tokens kept or removed, rounded as Python's round() does; 0.5
    """

    layer: int = 2
    keep: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        check_int(self.name, "layer", self.layer, 0)
        keep_fraction(self.name, self.keep, self.ratio, 0.5)

    def default_layers(self, depth: int) -> list[int]:
        return [self.layer]

    def left(self, place: Place) -> Any:
        return round(keep_fraction(self.name, self.keep, self.ratio, 0.5) * place.free)

    def score(self, site: Site) -> Tensor:
        return site.attention(row=-1).mean(1)
