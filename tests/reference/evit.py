"""EViT: keep the tokens that the class token attends to most, fuse the others into one.

Liang, Ge, Tong, Song, Wang, Xie. Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations. ICLR 2022. arXiv 2202.07800, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .driver import Cut, Site


@dataclass(frozen=True)
class EViT:
    keep: float = 0.7
    layers: list[int] = field(default_factory=lambda: [3, 6, 9])
    fuse: bool = True
    prop_attn: bool = False

    def cut(self, site: Site) -> Cut | None:
        if site.layer not in self.layers:
            return None
        if site.head < 1:
            raise ValueError("EViT needs a class token at position 0")
        n = site.x.shape[1]
        free = list(range(site.head, n - site.tail))
        k = math.ceil(self.keep * len(free) - 1e-9)
        if k >= len(free):
            return None
        attention = site.probs.detach()[:, :, 0, :].mean(dim=1)  # [B N], the class token's row
        rows = [self.one(x, a, free, k, site) for x, a in zip(site.x, attention, strict=True)]
        x = torch.stack([x for x, _ in rows])
        return Cut(x, x.new_ones(x.shape[:2]), torch.stack([u for _, u in rows]))

    def one(self, x: Tensor, a: Tensor, free: list[int], k: int, site: Site) -> tuple[Tensor, Tensor]:
        """One sample: new rows [N' C] and the restore matrix [N N']."""
        n = x.shape[0]
        ranked = sorted(free, key=lambda i: -float(a[i]))
        kept, dropped = ranked[:k], ranked[k:]
        slots = [*range(site.head), *kept]
        rows = [x[i] for i in slots]
        where = {i: slot for slot, i in enumerate(slots)}
        if self.fuse:
            where |= dict.fromkeys(dropped, len(rows))
            fused = torch.zeros_like(x[0])
            for i in dropped:
                fused = fused + a[i] * x[i]
            rows.append(fused)
        for i in range(n - site.tail, n):
            where[i] = len(rows)
            rows.append(x[i])
        restore = x.new_zeros(n, len(rows))
        for i, slot in where.items():
            restore[i, slot] = 1.0
        return torch.stack(rows), restore
