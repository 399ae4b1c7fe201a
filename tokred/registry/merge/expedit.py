"""Expedit: cluster the grid of patches once into soft superpixels, restore them where the grid is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tokred.errors import ArgumentError
from tokred.registry.grid import cell_numbers, coarser
from tokred.registry.maps import Soft, TokenMap
from tokred.registry.method import Reduction, check_int, keep_fraction
from tokred.registry.register import register
from tokred.registry.site import Place, Site, precise


@register("merge", "expedit")
@dataclass(frozen=True)
class Expedit(Reduction):
    """Cluster the grid of patches into soft superpixels after one layer; outputs are restored by similarity.

    Liang, Yuan, Ding, Luo, Lin, Jia, Zhang, Zhang, Hu: "Expediting Large-Scale Vision Transformer for Dense Prediction
    without Fine-tuning", NeurIPS 2022, arXiv 2210.01035, section 3. Restoring weights sum to one, as the text says;
    the released code divides them by their L2 norm.

    layer        where: an int, negative from the end; None is the middle of the model
    grid         rows and columns of superpixels
    iterations   of clustering
    tau          sharpness of the clusters: 0.01 in the paper's SAM, 0.02 in its Segmenter
    window       a token belongs to superpixels in the window x window cells around its own
    top_k        a restored token mixes the top_k superpixels that are most like it
    keep, ratio  instead of grid: the superpixels are about this share of the patches, or all but it; keep=0.25
    """

    layer: int | None = None
    grid: tuple[int, int] | list[int] | None = None
    iterations: int = 5
    tau: float = 0.01
    window: int = 5
    top_k: int = 20
    keep: float | None = None
    ratio: float | None = None

    needs = ("grid",)

    def __post_init__(self) -> None:
        keep_fraction(self.name, self.keep, self.ratio, 1.0)
        if self.layer is not None and self.layers is not None:
            raise ArgumentError(f"expedit(layer={self.layer!r}, layers={self.layers!r}): give one of them")
        if self.layer is not None:
            check_int(self.name, "layer", self.layer)
        if self.grid is not None:
            if not isinstance(self.grid, (tuple, list)) or len(self.grid) != 2:
                raise ArgumentError(f"expedit(grid={self.grid!r}): rows and columns of superpixels, such as (7, 7)")
            for side in self.grid:
                check_int(self.name, "grid", side, 1)
            if self.keep is not None or self.ratio is not None:
                raise ArgumentError(f"{self}: the grid says how many superpixels stay; give it, keep or ratio")
        for name in ("iterations", "window", "top_k"):
            check_int(self.name, name, getattr(self, name), 1)
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)) or not 0 < self.tau < float("inf"):
            raise ArgumentError(f"expedit(tau={self.tau!r}): a number above 0")

    def default_layers(self, depth: int) -> list[int]:
        return [depth // 2 if self.layer is None else self.layer]

    def cells(self, place: Place) -> tuple[int, int]:
        """Rows and columns of superpixels at this place."""
        assert place.grid is not None
        if self.grid is None:
            return coarser(place.grid, keep_fraction(self.name, self.keep, self.ratio, 0.25))
        rows, columns = self.grid
        if rows > place.grid[0] or columns > place.grid[1]:
            raise ArgumentError(f"expedit(grid={self.grid!r}): the patches' grid is {place.grid}, which is no finer")
        return rows, columns

    def removed(self, place: Place) -> Any:
        rows, columns = self.cells(place)
        return place.free - rows * columns

    def plan(self, site: Site) -> TokenMap:
        assert site.grid is not None
        cells = self.cells(site)
        x = precise(site.hidden)[:, site.head : site.tokens - site.tail]  # [B N' C]
        image = x.transpose(1, 2).unflatten(-1, site.grid)  # [B C Y X]
        centres = adaptive_avg_pool2d(image, cells).flatten(2).transpose(1, 2)  # [B K C]
        far = ~self.near(site.grid, cells, x.device)  # [N' K]
        for _ in range(self.iterations):
            share = self.likeness(x, centres).masked_fill(far, -torch.inf).softmax(-1).transpose(1, 2)  # [B K N']
            if site.valid is not None:  # padding has no say
                share = share * site.valid[:, site.head : site.tokens - site.tail].unsqueeze(1)
            matrix = share / share.sum(-1, keepdim=True).clamp(min=1e-16)
            centres = matrix @ x
        likeness = self.likeness(x, centres)  # [B N' K]
        if self.top_k < cells[0] * cells[1]:
            weakest = likeness.topk(self.top_k, dim=-1).values[..., -1:]
            likeness = likeness.masked_fill(likeness < weakest, -torch.inf)
        return Soft(matrix, likeness.softmax(-1)).window(-site.head, -site.tail, None)  # protected rows pass through

    def likeness(self, x: Tensor, centres: Tensor) -> Tensor:
        """[B N' K] -tau ||x - c||^2, less tau ||x||^2, which every softmax over the centres cancels."""
        return (2 * x @ centres.transpose(1, 2) - centres.square().sum(-1).unsqueeze(1)) * self.tau

    def near(self, grid: tuple[int, int], cells: tuple[int, int], device: torch.device) -> Tensor:
        """[N' K] whether a superpixel's cell is in the window around a token's cell."""
        row, column = cell_numbers(grid, cells, device)
        cell = torch.arange(cells[0] * cells[1], device=device)
        rows_apart = (row.unsqueeze(1) - cell // cells[1]).abs()
        columns_apart = (column.unsqueeze(1) - cell % cells[1]).abs()
        return torch.maximum(rows_apart, columns_apart) <= self.window // 2
