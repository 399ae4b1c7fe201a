"""pool: average neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokred.registry.grid import cell_numbers, coarser, first_of_cells, others
from tokred.registry.maps import Merge, TokenMap, joined
from tokred.registry.method import Share
from tokred.registry.register import register
from tokred.registry.site import Place, Site


@register("baseline", "pool")
@dataclass(frozen=True)
class Pool(Share):
    """Average contiguous groups of neighbours, whatever they hold. A baseline: what a matching must beat.

    On a grid of patches the groups are the cells of a coarser grid with about `keep` times as many of them; elsewhere,
    and after a first reduction, they are runs of neighbours in the sequence. Means are weighted by size, as in ToMe
    (Bolya et al., arXiv 2210.09461, section 3).

    Image tokens of a language model are runs of neighbours too, each in the place of its first.

    keep, ratio   fraction of the unprotected tokens kept or removed at each cut; 0.5
    layers        None is three cuts, a quarter, half and three quarters of the way
    """

    merges = "visual"

    def cells(self, place: Place) -> tuple[Any, Any]:
        if place.grid is None:
            return 1, place.count(self.kept)
        return coarser(place.grid, self.kept)

    def removed(self, place: Place) -> Any:
        height, width = self.cells(place)
        return place.free - height * width

    def plan(self, site: Site) -> TokenMap:
        grid, cells, device = site.grid or (1, site.free), self.cells(site), site.hidden.device
        row, column = cell_numbers(grid, cells, device)
        first = first_of_cells(grid, cells, device)  # [K]
        rest = others(first, site.free)  # [N - K]
        target = first[(row * cells[1] + column)[rest]]
        candidates = site.candidates()  # [B N]
        keep, src, into = joined(candidates[:, rest], candidates[:, target], site.tokens)
        return Merge.mean(keep, src, into, site.sizes())
