"""elastic_pool: average the image tokens over the windows of a coarser grid, before the language model."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tokred.errors import ArgumentError
from tokred.registry.grid import coarser
from tokred.registry.maps import TokenMap, rows
from tokred.registry.method import Reduction, check_int, keep_fraction
from tokred.registry.register import register
from tokred.registry.site import Place, Site, precise


@register("merge", "elastic_pool")
@dataclass(frozen=True)
class ElasticPool(Reduction):
    """Pool the features of each image to a square number of tokens, in front of the language model's first layer.

    "TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference", arXiv 2504.03154 (no code was released):
    adaptive average pooling to 8 x 8, 12 x 12 or 16 x 16 tokens, as PyTorch's: of Y patches in a column, token i is the
    mean of those from floor(i Y / h) to ceil((i + 1) Y / h), so windows overlap where h does not divide Y, as in the
    paper's 27 x 27. The paper pools in front of a projector that was trained for it; an unmodified model has no such
    projector, so this pools behind its own. Each token stands in the place of its window's first patch, with that
    position (the paper's are numbered anew). It takes one image of one square grid a sample.

    tokens        how many are left of each sample's image, a square number; or
    keep, ratio   the fraction kept or removed, to the next grid; 1/4
    """

    tokens: int | None = None
    keep: float | None = None
    ratio: float | None = None

    needs = ("visual",)
    scope = "layer"
    merges = "visual"

    def __post_init__(self) -> None:
        keep_fraction(self.name, self.keep, self.ratio, 0.25)
        if self.tokens is not None:
            check_int(self.name, "tokens", self.tokens, 1)
            if isqrt(self.tokens) ** 2 != self.tokens:
                raise ArgumentError(f"{self.name}(tokens={self.tokens}): a square number, such as 64, 144 or 256")
            if self.keep is not None or self.ratio is not None:
                raise ArgumentError(f"{self.name}(tokens={self.tokens}): give tokens, keep or ratio, not two of them")

    def default_layers(self, depth: int) -> list[int]:
        return [0]

    def grids(self, place: Place) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of the patches, and of the tokens. Raises ArgumentError where the patches form no square."""
        if place.images is not None and place.images > 1:  # whose tokens together may be a square number
            raise ArgumentError(f"{self.name}: {place.images} images in a sample are not one square grid")
        side = isqrt(place.free)
        if side * side != place.free or place.free != place.whole:
            raise ArgumentError(f"{self.name}: {place.free} image tokens of {place.whole} are not one square grid")
        if self.tokens is not None:
            cells = min(isqrt(self.tokens), side)
            return (side, side), (cells, cells)
        return (side, side), coarser((side, side), keep_fraction(self.name, self.keep, self.ratio, 0.25))

    def removed(self, place: Place) -> Any:
        _, cells = self.grids(place)
        return place.free - cells[0] * cells[1]

    def plan(self, site: Site) -> TokenMap:
        return site.keep_candidates(self.first(site).expand(site.batch, -1))

    def revise(self, site: Site, token_map: TokenMap) -> Tensor:
        """The stream with each window's mean in its first patch's row; padding counts for nothing."""
        grid, cells = self.grids(site)
        candidates = site.candidates()  # [B V]
        weight = site.members().gather(1, candidates).unsqueeze(-1)
        image = precise(rows(site.hidden, candidates)) * weight
        image, weight = (x.mT.unflatten(-1, grid) for x in (image, weight.to(image.dtype)))  # [B C Y X]
        pooled = adaptive_avg_pool2d(image, cells) / adaptive_avg_pool2d(weight, cells).clamp(min=1e-6)
        means = pooled.flatten(2).mT.to(site.hidden.dtype)  # [B K C]
        where = candidates[:, self.first(site)].unsqueeze(-1).expand_as(means)
        return site.hidden.scatter(1, where, means)

    def first(self, site: Site) -> Tensor:
        """[K] the number of each window's first patch, ascending."""
        (height, width), (h, w) = self.grids(site)
        row, column = (torch.arange(n, device=site.hidden.device) * side // n for side, n in ((height, h), (width, w)))
        number: Tensor = row.unsqueeze(1) * width + column
        return number.flatten()
