"""ToMe: merge the most similar tokens, a few in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokred.errors import ArgumentError
from tokred.registry.maps import Merge, TokenMap
from tokred.registry.matching import bipartite, mergeable
from tokred.registry.method import Reduction, check_flag, check_r, per_layer
from tokred.registry.register import register
from tokred.registry.site import Place, Site


@register("merge", "tome")
@dataclass(frozen=True)
class ToMe(Reduction):
    """Merge the r pairs of tokens with the most similar keys, in every layer.

    Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman: "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461,
    section 3. Order of tokens and option names as in the released code.

    r          tokens removed per layer: an int, a list with one entry a layer, or (r, inflection)
    prop_attn  add log(size) to the attention scores over merged keys (equation 1); the paper turns it off for MAE
    order      "tome": unmerged even tokens, then odd ones; "preserve": by position of the representative
    """

    r: int | list[int] | tuple[int, float] = 8
    prop_attn: bool = True
    order: str = "tome"

    needs = ("keys",)

    def __post_init__(self) -> None:
        check_r(self.name, self.r)
        check_flag(self.name, "prop_attn", self.prop_attn)
        if self.order not in ("tome", "preserve"):
            raise ArgumentError(f"tome(order={self.order!r}): 'tome' or 'preserve'")

    def removed(self, place: Place) -> Any:
        return min(per_layer(self.r, place.layer, place.depth), mergeable(place))

    def plan(self, site: Site) -> TokenMap:
        keep, src, into = bipartite(site, site.metric(), self.removed(site))
        if self.order == "preserve":
            keep, rank = keep.sort(dim=1)  # rank: the slot that each sorted place had before
            into = torch.zeros_like(rank).scatter(1, rank, site.arange(0, keep.shape[1])).gather(1, into)
        return Merge.mean(keep, src, into, site.sizes(), prop_attn=self.prop_attn)
