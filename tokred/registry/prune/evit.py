"""EViT: keep the tokens that the class token attends to most, fuse the others into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokred.registry.maps import Keep, Merge, TokenMap
from tokred.registry.method import Share, check_flag
from tokred.registry.register import register
from tokred.registry.site import Place, Site


@register("prune", "evit")
@dataclass(frozen=True)
class EViT(Share):
    """Keep the tokens that the class token attends to most, and fuse the others into one.

    Liang, Ge, Tong, Song, Wang, Xie: "Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations", ICLR 2022, arXiv 2202.07800, section 3. As in the released code, the kept tokens come in
    descending order of attention and the fused token is the sum of a_i x_i over the dropped ones, not normalised.

    keep, ratio   fraction of the unprotected tokens kept or removed at each cut; 0.7
    fuse          whether the dropped tokens become one; a cut that would drop a single token to fuse it is no cut
    layers        None is three cuts, a quarter, half and three quarters of the way: the paper's 3, 6, 9 of 12
    """

    fuse: bool = True

    needs = ("class_token",)
    averages = False  # the fused token is a sum
    default_keep = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self.name, "fuse", self.fuse)

    def removed(self, place: Place) -> Any:
        dropped = place.free - place.count(self.kept)
        return dropped - 1 if self.fuse and dropped else dropped

    def plan(self, site: Site) -> TokenMap:
        attention = site.attention(row=0).mean(1)[:, site.head : site.tokens - site.tail]  # [B N']
        attention, ranked = attention.sort(dim=-1, descending=True, stable=True)
        ranked, kept = ranked + site.head, site.count(self.kept)
        if not self.fuse:
            return Keep(site.with_protected(ranked[:, :kept]))
        # the fused token stands in the place of the first that is dropped, the others are added to it
        keep, src = site.with_protected(ranked[:, : kept + 1]), ranked[:, kept + 1 :]
        weight = torch.ones_like(keep, dtype=attention.dtype)
        slot = site.head + kept
        weight = torch.cat([weight[:, :slot], attention[:, kept : kept + 1], weight[:, slot + 1 :]], 1)
        return Merge(keep, src, torch.full_like(src, slot), weight, attention[:, kept + 1 :])
