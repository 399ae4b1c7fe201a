"""ZOO-Prune: image tokens that are sensitive, and unlike those already chosen, go into the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokred.backends.kernels.greedy import greedy_diverse
from tokred.registry.register import register
from tokred.registry.site import Site, precise
from tokred.registry.visual import DiverseCut


@register("prune", "zoo_prune")
@dataclass(frozen=True)
class ZOOPrune(DiverseCut):
    """Keep, one after the other, the visual token with the largest S (1 - its largest cosine to those already kept).

    Kim, Zhang, Liu, Jung, Lee, Hong: "ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in
    Vision-Language Models", CVPR 2026, arXiv 2509.24837. No code was released.

    S is NOT the paper's. There it is the mean change of the projector's output M under 128 small random changes of its
    input, scaled to [0, 1] over the image. Here the projector does not run again: S is the length of its output, scaled
    in the same way, as it enters the language model. A third party's reproduction measured a rank correlation of 0.986
    between the two on Qwen3-VL, and found the paper's step, 0.01, near the resolution of bfloat16. So this is the
    paper's choice under another score, and its results are not the paper's. Positions persist.

    layer         the first layer that runs on fewer tokens, from 0; 0, what enters the language model
    keep, ratio   fraction of the visual tokens kept or removed; 1/9, the paper's 64 of 576
    """

    default_keep = 64 / 576

    def choose(self, site: Site, tokens: Tensor, among: Tensor | None, count: Any) -> Tensor:
        length = precise(tokens).norm(dim=-1)  # [B V]
        low, high = (length, length) if among is None else (length.where(among, torch.inf), length.where(among, 0.0))
        low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
        score = (length - low) / (high - low).clamp(min=1e-12)
        chosen: Tensor = greedy_diverse(tokens, count, "max", score, None, among)
        return chosen
