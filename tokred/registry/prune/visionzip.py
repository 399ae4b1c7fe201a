"""VisionZip: before the language model, keep the image tokens that the vision encoder's class token looks at, and merge
the others into a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokred.errors import ArgumentError
from tokred.registry.maps import TokenMap, partition, rows
from tokred.registry.method import keep_fraction
from tokred.registry.register import register
from tokred.registry.site import Place, Site, precise
from tokred.registry.visual import VisualCut


@register("prune", "visionzip")
@dataclass(frozen=True)
class VisionZip(VisualCut):
    """Keep dominant image tokens as they are, and a few contextual ones with the features of the others added.

    Yang, Chen, Tian, Wang, Li, Yu, Jia: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR
    2025, arXiv 2412.04467, section 3.2. In the last layer of the vision encoder that the features come from, the tokens
    with the largest class attention are dominant (without a class token, with the largest mean attention). Of the
    others every n-th is contextual, and each remaining one goes to the contextual token with the most similar key
    (cosine, mean over heads). As in the released code a contextual token is the sum of its own features and the mean of
    those that went to it, before the projector.

    The class token is no token of these language models, so all dominant ones are patches (the released code keeps the
    class token among them), and positions persist (there the prompt is numbered anew).

    keep, ratio   fraction of the visual tokens kept or removed, rounded; 64 of 576
    contextual    which fraction of those that are kept is contextual; 10 of 64
    """

    keep: float | None = None
    ratio: float | None = None
    contextual: float = 10 / 64

    needs = ("visual", "tower")
    merges = "visual"
    causal_safe = False

    def __post_init__(self) -> None:
        keep_fraction(self.name, self.keep, self.ratio, 1 / 9)
        if not isinstance(self.contextual, (int, float)) or not 0 <= self.contextual <= 1:
            raise ArgumentError(f"{self.name}(contextual={self.contextual!r}): a fraction in [0, 1]")

    def default_layers(self, depth: int) -> list[int]:
        return [0]

    def left(self, place: Place) -> Any:
        return round(keep_fraction(self.name, self.keep, self.ratio, 1 / 9) * place.free)

    def plan(self, site: Site) -> TokenMap:
        dominant, targets, _ = self.choose(site)
        kept, _ = partition(torch.cat([dominant, targets], 1), site.free)
        return site.keep_candidates(kept)

    def revise(self, site: Site, token_map: TokenMap) -> Tensor:
        tower = site.tower
        assert tower is not None
        _, targets, others = self.choose(site)
        if targets.shape[1] == 0 or others.shape[1] == 0:
            return site.hidden
        key = normalize(tower.key, dim=-1)
        nearest = (rows(key, others) @ rows(key, targets).transpose(1, 2)).argmax(-1)  # [B R]
        belongs = nearest.unsqueeze(1) == torch.arange(targets.shape[1], device=nearest.device).unsqueeze(-1)  # [B M R]
        member = belongs.to(precise(tower.hidden).dtype)
        weight = (member / member.sum(-1, keepdim=True).clamp(min=1)).to(tower.hidden.dtype)
        merged = rows(tower.hidden, targets) + weight @ rows(tower.hidden, others)
        where = rows(site.candidates().unsqueeze(-1), targets)  # [B M 1]
        features = tower.project(merged).to(site.hidden.dtype)
        return site.hidden.scatter(1, where.expand(-1, -1, features.shape[-1]), features)

    def choose(self, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of dominant [B D], contextual [B M] and all other visual tokens, each ascending."""
        assert site.tower is not None
        count = self.left(site)
        contextual = round(self.contextual * count)
        dominant, rest = partition(site.tower.attention.topk(count - contextual, dim=1).indices, site.free)
        step = max(rest.shape[1] // contextual, 1) if contextual else 1
        targets = torch.arange(contextual, device=rest.device).mul(step).expand(rest.shape[0], -1)
        chosen, others = partition(targets, rest.shape[1])
        return dominant, rest.gather(1, chosen), rest.gather(1, others)
