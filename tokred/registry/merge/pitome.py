"""PiToMe: merge tokens that have many near neighbours, keep the isolated ones."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Any

import torch
from torch.nn.functional import elu

from tokred.errors import ArgumentError
from tokred.registry.maps import Merge, TokenMap, rows
from tokred.registry.matching import mergeable
from tokred.registry.method import Reduction, check_flag, keep_fraction
from tokred.registry.register import register
from tokred.registry.site import Place, Site, precise

Fractions = float | list[float] | tuple[float, ...]


@register("merge", "pitome")
@dataclass(frozen=True)
class PiToMe(Reduction):
    """Merge the tokens of highest energy, those with many near neighbours, in every layer; keep the isolated ones.

    Tran, Nguyen, Nguyen et al.: "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024,
    arXiv 2405.16148, section 3. The energy is the released code's mean of ELU(cosine - margin), the text has a Gaussian
    kernel beyond the margin; every layer uses the split by energy.

    keep, ratio   fraction of the unprotected tokens kept or removed in each layer: one number, or one for each layer,
                  where missing ones leave the layer alone; keep=0.9. A step removes half of the tokens at most.
    prop_attn     add log(size) to the attention scores over merged keys; off, as in the released DeiT
    """

    keep: Fractions | None = None
    ratio: Fractions | None = None
    prop_attn: bool = False

    needs = ("keys",)

    def __post_init__(self) -> None:
        if self.keep is not None and self.ratio is not None:
            raise ArgumentError(f"pitome(keep={self.keep!r}, ratio={self.ratio!r}): give one of them")
        for name, given in (("keep", self.keep), ("ratio", self.ratio)):
            for value in given if isinstance(given, (list, tuple)) else [given]:
                keep_fraction(self.name, **({"keep": None, "ratio": None} | {name: value}), default=1.0)
        check_flag(self.name, "prop_attn", self.prop_attn)

    def kept(self, layer: int) -> float:
        """The fraction kept in one layer."""
        if isinstance(self.ratio, (list, tuple)):
            return 1 - self.ratio[layer] if layer < len(self.ratio) else 1.0
        if isinstance(self.keep, (list, tuple)):
            return self.keep[layer] if layer < len(self.keep) else 1.0
        return keep_fraction(self.name, self.keep, self.ratio, 0.9)

    def removed(self, place: Place) -> Any:
        # 1e-9: 100 - 28.000000000000004 is 72
        return min(floor(place.free - place.free * self.kept(place.layer) + 1e-9), mergeable(place))

    def plan(self, site: Site) -> TokenMap:
        r, stop = self.removed(site), site.tokens - site.tail
        metric = site.metric()[:, site.head : stop]  # [B N' D]
        margin = 0.75 - 0.75 * site.layer / site.depth  # the released code's schedule
        near = elu(precise(metric @ metric.transpose(1, 2)) - margin)  # [B N' N']
        if site.valid is None:
            energy = near.mean(-1)
        else:  # padding is no neighbour, and merges first
            valid = site.valid[:, site.head : stop]
            energy = (near * valid.unsqueeze(1)).sum(-1) / valid.sum(-1, keepdim=True).clamp(min=1)
            energy = energy.masked_fill(~valid, torch.inf)
        ranked = energy.argsort(dim=-1, descending=True, stable=True)
        gone, target, rest = ranked[:, : 2 * r : 2], ranked[:, 1 : 2 * r : 2], ranked[:, 2 * r :]
        scores = rows(metric, gone) @ rows(metric, target).transpose(1, 2)  # [B r r]
        into = scores.argmax(-1) + (site.head + rest.shape[1])
        keep = site.with_protected(torch.cat([rest, target], 1) + site.head)
        return Merge.mean(keep, gone + site.head, into, site.sizes(), prop_attn=self.prop_attn)
