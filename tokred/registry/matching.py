"""Bipartite soft matching, shared by several methods (Bolya et al., "Token Merging", arXiv 2210.09461, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred.registry.maps import partition
from tokred.registry.site import Place, Site

__all__ = ["bipartite", "mergeable"]


def mergeable(place: Place) -> Any:
    """The most tokens that one bipartite step can remove: half of the unprotected ones."""
    return place.free // 2


def bipartite(site: Site, metric: Tensor, r: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the r most similar (even, odd) pairs. metric [B N D], rows of length one.

    Returns keep [B K], src [B r] and into [B r] as `Merge` takes them, in the reference's order:
    head, unmerged even tokens ascending, odd tokens ascending, tail.
    """
    head, stop = site.head, site.tokens - site.tail
    even, odd = head + head % 2, head + 1 - head % 2  # protected tokens take no part, so they need no mask
    scores = metric[:, even:stop:2] @ metric[:, odd:stop:2].transpose(-1, -2)  # [B A O]
    if site.valid is not None:  # padding merges with padding
        differ = site.valid[:, even:stop:2].unsqueeze(2) != site.valid[:, odd:stop:2].unsqueeze(1)
        scores = scores - differ.to(scores.dtype) * 4  # below every cosine, above no pair at all
    best, partner = scores.max(-1)  # [B A]
    gone, stay = partition(best.topk(r, dim=1).indices, best.shape[1])
    odds = torch.arange(odd, stop, 2, device=metric.device).expand(site.batch, -1)
    keep = site.with_protected(torch.cat([stay * 2 + even, odds], 1))
    return keep, gone * 2 + even, partner.gather(1, gone) + (head + stay.shape[1])
