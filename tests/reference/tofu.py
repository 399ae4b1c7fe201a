"""ToFu: ToMe's matching; prune in the first half of the blocks, norm-preserving merge (MLERP) in the second.

Kim, Gao, Hsu, Shen, Jin. Token Fusion: Bridging the Gap between Token Pruning and Token Merging. WACV 2024.
arXiv 2312.01026.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .driver import Cut, Site
from .tome import Rate, match, one_hot, schedule


def mlerp(rows: Tensor) -> Tensor:
    """The mean of a group's rows [G C], as long as the longest of them."""
    if rows.shape[0] == 1:
        return rows[0]
    mean = rows.mean(dim=0)
    return mean * rows.norm(dim=-1).max() / mean.norm()


@dataclass(frozen=True)
class ToFu:
    r: Rate
    prop_attn: bool = False

    def cut(self, site: Site) -> Cut | None:
        n = site.x.shape[1]
        r = min(schedule(self.r, site.layer, site.layers), (n - site.head - site.tail) // 2)
        if r <= 0:
            return None
        with torch.no_grad():
            batch = [match(cosine, r, site.head, site.tail) for cosine in site.cosine]
            s = one_hot(batch, n, site.x)
        if site.layer < site.layers // 2:
            x = torch.stack([x[[group[0] for group in groups]] for x, groups in zip(site.x, batch, strict=True)])
        else:
            x = torch.stack(
                [torch.stack([mlerp(x[group]) for group in groups]) for x, groups in zip(site.x, batch, strict=True)]
            )
        return Cut(x, x.new_ones(x.shape[:2]), s.transpose(1, 2))
