"""Expedit: cluster the token grid once into soft superpixels, restore at the end.

Liang, Yuan, Ding, Luo, Lin, Jia, Zhang, Zhang, Hu. Expediting Large-Scale Vision Transformer for Dense Prediction
without Fine-tuning. NeurIPS 2022. arXiv 2210.01035, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .driver import Cut, Site


def squared_distances(x: Tensor, c: Tensor) -> Tensor:
    return ((x[:, None, :] - c[None, :, :]) ** 2).sum(dim=-1)  # [n C], [K C] -> [n K]


def window_mask(grid: tuple[int, int], centres: tuple[int, int], window: int) -> Tensor:
    """[n K]: whether a centre is in the window of cells around a token."""
    (rows, cols), (h, w) = grid, centres
    near = torch.zeros(rows, cols, h, w, dtype=torch.bool)
    for y in range(rows):
        for x in range(cols):
            for i in range(h):
                for j in range(w):
                    cell_y, cell_x = y * h // rows, x * w // cols
                    near[y, x, i, j] = abs(i - cell_y) <= window // 2 and abs(j - cell_x) <= window // 2
    return near.view(rows * cols, h * w)


@dataclass(frozen=True)
class Expedit:
    layer: int
    grid: tuple[int, int]
    iterations: int = 5
    tau: float = 0.01
    window: int = 5
    top_k: int = 20
    prop_attn: bool = False

    def cut(self, site: Site) -> Cut | None:
        if site.layer != self.layer:
            return None
        assert site.grid is not None, "Expedit needs a grid of patches"
        pairs = [self.one(x, site) for x in site.x.detach()]
        transform = torch.stack([t for t, _ in pairs])  # [B N' N]
        x = transform @ site.x
        return Cut(x, x.new_ones(x.shape[:2]), torch.stack([u for _, u in pairs]))

    def one(self, rows: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """One sample [N C]: T [N' N] and U [N N'], with the protected tokens passed through."""
        n = rows.shape[0]
        assert site.grid is not None
        t, u = self.cluster(rows[site.head : n - site.tail], site.grid)
        head, tail = torch.eye(site.head, dtype=t.dtype), torch.eye(site.tail, dtype=t.dtype)
        return torch.block_diag(head, t, tail), torch.block_diag(head, u, tail)

    def cluster(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Patches [n C]: T [K n] and U [n K]."""
        image = x.T.reshape(1, -1, *grid)
        c = F.adaptive_avg_pool2d(image, self.grid)[0].flatten(1).T  # [K C]
        near = window_mask(grid, self.grid, self.window)
        for _ in range(self.iterations):
            logits = (-self.tau * squared_distances(x, c)).masked_fill(~near, -torch.inf)
            a = logits.softmax(dim=1)  # [n K]
            t = a.T / a.sum(dim=0).clamp(min=1e-16)[:, None]
            c = t @ x
        kernel = torch.exp(-self.tau * squared_distances(x, c))
        weakest = kernel.topk(min(self.top_k, kernel.shape[1]), dim=1).values[:, -1:]
        kernel = torch.where(kernel >= weakest, kernel, torch.zeros_like(kernel))
        return t, kernel / kernel.sum(dim=1, keepdim=True)
