"""ZOO-Prune: image tokens that are sensitive, and unlike those already chosen, go into the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokred.backends.kernels.greedy import greedy_diverse
from tokred.errors import ArgumentError
from tokred.registry.grid import normal
from tokred.registry.method import check_int
from tokred.registry.register import register
from tokred.registry.site import Site, Tower, precise
from tokred.registry.visual import DiverseCut

TOGETHER = 8  # directions in one run of the projector: 9216 rows for each 576 tokens, instead of 64 times as many nodes


@register("prune", "zoo_prune")
@dataclass(frozen=True)
class ZOOPrune(DiverseCut):
    """Keep, one after the other, the visual token with the largest S (1 - its largest cosine to those already kept).

    Kim, Zhang, Liu, Jung, Lee, Hong: "ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in
    Vision-Language Models", CVPR 2026, arXiv 2509.24837. No code was released.

    S is how much the projector M changes near the token x that it reads, scaled to [0, 1] over the image: the mean over
    directions u of |M(x + h u) - M(x - h u)| / 2h, every u the same for all tokens, standard normal, h the step. So the
    projector runs 128 times more. It does so in float32 at least: a third party found the paper's step near the
    resolution of bfloat16, in which the difference would be rounding. The directions are drawn from `seed` alone and
    are the same on every device and in every run. A wide projector is not factorised, as the paper does for LLaVA-NeXT.
    Positions persist.

    With probes=0, S is the length of the projector's output instead, as it enters the language model. This is not the
    paper's score. The same third party measured a rank correlation of 0.986 between the two on Qwen3-VL; it costs
    nothing, and is left where no vision encoder shows whose patches became the image tokens.

    layer         the first layer that runs on fewer tokens, from 0; 0, what enters the language model
    keep, ratio   fraction of the visual tokens kept or removed; 1/9, the paper's 64 of 576
    probes        how many directions; 64. 0 is the length
    step          h; 0.01
    seed          of the directions
    """

    probes: int = 64
    step: float = 0.01
    seed: int = 0

    default_keep = 64 / 576

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(self.name, "probes", self.probes, 0)
        check_int(self.name, "seed", self.seed)
        if isinstance(self.step, bool) or not isinstance(self.step, (int, float)) or not 0 < self.step < 1e9:
            raise ArgumentError(f"{self.name}(step={self.step!r}): a number > 0")

    def needs_at(self, layer: int, depth: int) -> tuple[str, ...]:
        return ("visual", "tower") if self.probes else self.needs

    def choose(self, site: Site, tokens: Tensor, among: Tensor | None, count: Any) -> Tensor:
        change = self.sensitivity(site.tower) if self.probes else precise(tokens).norm(dim=-1)  # [B V]
        low, high = (change, change) if among is None else (change.where(among, torch.inf), change.where(among, 0.0))
        low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
        score = (change - low) / (high - low).clamp(min=1e-12)
        chosen: Tensor = greedy_diverse(tokens, count, "max", score, None, among)
        return chosen

    def sensitivity(self, tower: Tower | None) -> Tensor:
        """[B V] S before it is scaled."""
        assert tower is not None
        x = precise(tower.hidden).unsqueeze(1)  # [B 1 V C']
        directions = normal(self.probes, x.shape[-1], self.seed, x.device).to(x.dtype).unsqueeze(1)  # [P 1 C']
        total = torch.zeros_like(x[:, 0, :, 0])
        for some in (self.step * directions).split(TOGETHER):
            ahead, behind = (tower.project(moved.flatten(1, 2)) for moved in (x + some, x - some))  # [B 8*V C]
            total = total + (ahead - behind).norm(dim=-1).unflatten(1, (some.shape[0], -1)).sum(1)
        return total / (2 * self.step * self.probes)
