"""elastic_pool: average the image tokens over the cells of a coarser grid, before the language model."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

from tokred.errors import ArgumentError
from tokred.registry.grid import cell_numbers, coarser, first_of_cells, others
from tokred.registry.maps import Merge, TokenMap, joined
from tokred.registry.method import Reduction, check_int, keep_fraction
from tokred.registry.register import register
from tokred.registry.site import Place, Site


@register("merge", "elastic_pool")
@dataclass(frozen=True)
class ElasticPool(Reduction):
    """Pool the features of each image to a square number of tokens, in front of the language model's first layer.

    "TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference", arXiv 2504.03154 (no code was released):
    adaptive average pooling to 8 x 8, 12 x 12 or 16 x 16 tokens. The paper pools in front of a projector that was
    trained for it; an unmodified model has no such projector, so this pools behind its own. Each cell stands in the
    place of its first patch, with that position. It takes one image of one square grid a sample.

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
        """Rows and columns of the patches, and of the cells. Raises ArgumentError where the patches form no square."""
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
        grid, cells = self.grids(site)
        row, column = cell_numbers(grid, cells, site.hidden.device)
        first = first_of_cells(grid, cells, site.hidden.device)  # [K]
        rest = others(first, site.free)
        candidates = site.candidates()  # [B N']
        target = first[(row * cells[1] + column)[rest]]
        return Merge.mean(*joined(candidates[:, rest], candidates[:, target], site.tokens), site.sizes())
