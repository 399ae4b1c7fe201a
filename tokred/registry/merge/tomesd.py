"""ToMe for Stable Diffusion: one attention at a time sees merged tokens, the stream keeps all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokred.errors import ArgumentError
from tokred.registry.grid import others, shuffled
from tokred.registry.maps import Merge, TokenMap
from tokred.registry.method import Reduction, check_flag, check_fraction, check_int
from tokred.registry.register import register
from tokred.registry.site import Place, Site


@register("merge", "tomesd")
@dataclass(frozen=True)
class ToMeSD(Reduction):
    """Merge before each self-attention and copy back after it; the residual stream keeps every token.

    Bolya, Hoffman: "Token Merging for Fast Stable Diffusion", CVPR workshops 2023, arXiv 2303.17604, section 3. One
    token of each cell of the grid is a destination, the others merge into the destination most like them, as plain
    means. The released code matches on the stream before its norm; this, on what enters the attention, after it.

    ratio        fraction of the unprotected tokens removed; capped at 1 - 1 / (sx sy)
    sx, sy       columns and rows of a cell
    use_rand     whether the destination of a cell is drawn (by seed, layer and cell alone, the same for all samples);
                 False is its upper left token
    seed         another draw
    merge_attn   False leaves everything alone; cross-attention and MLPs are never touched (the released code's default)
    """

    ratio: float = 0.5
    sx: int = 2
    sy: int = 2
    use_rand: bool = True
    merge_attn: bool = True
    seed: int = 0

    needs = ("grid",)
    scope = "round_trip"

    def __post_init__(self) -> None:
        if self.ratio is None:
            raise ArgumentError("tomesd(ratio=None): the fraction removed must lie in [0, 1)")
        check_fraction(self.name, "ratio", self.ratio)
        check_int(self.name, "sx", self.sx, 1)
        check_int(self.name, "sy", self.sy, 1)
        check_int(self.name, "seed", self.seed)
        check_flag(self.name, "use_rand", self.use_rand)
        check_flag(self.name, "merge_attn", self.merge_attn)

    def cells(self, place: Place) -> tuple[int, int]:
        """Rows and columns of whole cells; patches beyond them are never destinations."""
        assert place.grid is not None
        rows, columns = place.grid[0] // self.sy, place.grid[1] // self.sx
        if not rows or not columns:
            raise ArgumentError(f"tomesd(sx={self.sx}, sy={self.sy}): one cell is larger than the grid {place.grid}")
        return rows, columns

    def removed(self, place: Place) -> Any:
        rows, columns = self.cells(place)
        return min(int(place.free * self.ratio), place.free - rows * columns) if self.merge_attn else 0

    def plan(self, site: Site) -> TokenMap:
        assert site.grid is not None
        (rows, columns), r = self.cells(site), self.removed(site)
        cell = torch.arange(rows * columns, device=site.hidden.device)
        inner = torch.zeros_like(cell)
        if self.use_rand:
            inner = shuffled(rows * columns, self.seed, site.layer, cell.device) % (self.sx * self.sy)
        row, column = cell // columns * self.sy + inner // self.sx, cell % columns * self.sx + inner % self.sx
        dst = row * site.grid[1] + column + site.head  # [K]
        src = others(dst - site.head, site.free) + site.head  # [N' - K]
        metric = site.hidden / site.hidden.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        best, partner = (metric[:, src] @ metric[:, dst].transpose(1, 2)).max(-1)  # [B N'-K]
        order = best.argsort(dim=-1, descending=True, stable=True)
        gone, stay = order[:, :r], order[:, r:]
        keep = site.with_protected(torch.cat([src[stay], dst.expand(site.batch, -1)], 1))
        into = partner.gather(1, gone) + (site.head + stay.shape[1])
        return Merge.mean(keep, src[gone], into, site.sizes())
