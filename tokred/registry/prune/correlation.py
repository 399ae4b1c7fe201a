"""Token-level correlation: crops of a document in which patches repeat keep fewer of their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokred.errors import ArgumentError
from tokred.registry.maps import TokenMap
from tokred.registry.method import check_int, keep_fraction
from tokred.registry.register import register
from tokred.registry.site import Place, Site, Tower, precise
from tokred.registry.visual import VisualCut


@register("prune", "correlation")
@dataclass(frozen=True)
class Correlation(VisualCut):
    """Split a number of tokens over a sample's crops by how little they repeat, and keep what the class token looks at.

    Zhang, Lyu, Shao, Chen, Guan, Nie: "Token-level Correlation-guided Compression for Efficient Multimodal Document
    Understanding", arXiv 2407.14439. Written from descriptions of the paper; its code was not to be had. A patch of a
    crop is redundant if many others of it have a similar key in the vision encoder's last layer (cosine, mean over
    heads); the density of a crop is the share of its patches that are not. It says how many tokens the crop keeps: some
    with the largest class attention in that layer ("global information mining"), then of the others those with the
    largest in a shallower one ("local"). Without a class token it is the mean attention of all tokens.

    The paper keeps as many tokens of each crop as its density says, a number that depends on the data. A compiled graph
    has one shape: here `keep` says how many tokens of a sample stay, and the densities share them out, one by one to
    the crop with the largest density / (tokens that it has + 1/2) (Webster's method); a sample of one crop just keeps
    `keep`. The paper samples, this takes the largest, so that runs can be repeated. Thresholds and shares are this
    package's.

    keep, ratio   fraction of the visual tokens kept or removed, rounded; 0.34, the 66 % that are reported removed
    similar       cosine from which on two keys are similar, in (-1, 1); 0.8
    repeats       how many similar others make a patch redundant; 5
    local         fraction of each crop's tokens that the shallower layer chooses; 0.5
    shallow       which layer that is, as a fraction of the way from the encoder's first layer to the last; 0.5
    """

    keep: float | None = None
    ratio: float | None = None
    similar: float = 0.8
    repeats: int = 5
    local: float = 0.5
    shallow: float = 0.5

    needs = ("visual", "tower")

    def __post_init__(self) -> None:
        keep_fraction(self.name, self.keep, self.ratio, 0.34)
        check_int(self.name, "repeats", self.repeats, 1)
        if not isinstance(self.similar, (int, float)) or not -1 < self.similar < 1:
            raise ArgumentError(f"{self.name}(similar={self.similar!r}): a cosine in (-1, 1)")
        for name, value in (("local", self.local), ("shallow", self.shallow)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
                raise ArgumentError(f"{self.name}({name}={value!r}): a fraction in [0, 1]")

    def default_layers(self, depth: int) -> list[int]:
        return [0]

    def encoder_layers(self, depth: int) -> list[int]:
        return [int(self.shallow * (depth - 1))]

    def left(self, place: Place) -> Any:
        return round(keep_fraction(self.name, self.keep, self.ratio, 0.34) * place.free)

    def plan(self, site: Site) -> TokenMap:
        tower, count = site.tower, self.left(site)
        assert tower is not None
        quota = self.quota(tower, count)  # [B I 1]
        deep, shallow = (
            precise(x).unflatten(1, (-1, tower.patches)) for x in (tower.attention, tower.earlier[:, 0])
        )  # [B I P]
        chosen = _rank(deep) < quota - (self.local * quota).round()
        chosen = chosen | (_rank(shallow.masked_fill(chosen, torch.inf)) < quota)
        first = chosen.flatten(1).to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return site.keep_candidates(first[:, :count])

    def quota(self, tower: Tower, count: Any) -> Tensor:
        """[B I 1] how many of the `count` tokens of each sample each of its crops keeps."""
        key = normalize(precise(tower.key), dim=-1).unflatten(1, (-1, tower.patches))  # [B I P D]
        others = (key @ key.transpose(-1, -2) > self.similar).sum(-1) - 1  # [B I P]
        density = (others < self.repeats).sum(-1, keepdim=True).clamp(min=1)  # [B I 1] in patches, so never nothing
        nth = torch.arange(tower.patches, device=key.device) + 0.5
        claims = (density.to(key.dtype) / nth.to(key.dtype)).flatten(1)  # [B I*P] of each crop on its n-th token
        won = torch.zeros_like(claims).scatter(1, claims.argsort(dim=-1, descending=True, stable=True)[:, :count], 1.0)
        counts: Tensor = won.unflatten(1, (-1, tower.patches)).sum(-1, keepdim=True)
        return counts


def _rank(score: Tensor) -> Tensor:
    """[.. P] how many of the scores are larger, or as large and in front."""
    rank: Tensor = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank
