"""CATP, stage 1: image tokens that stand for many others, and for what the text says, go into the language model."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokred.backends.kernels.greedy import greedy_diverse
from tokred.errors import ArgumentError
from tokred.registry.maps import rows
from tokred.registry.register import register
from tokred.registry.site import Place, Site, precise
from tokred.registry.visual import DiverseCut


@register("prune", "catp")
@dataclass(frozen=True)
class CATP(DiverseCut):
    """Keep the visual tokens Y that maximise facility location plus alignment with the text, greedily: CATP's stage 1.

    Li, Yang, Shen, Han, Xu, Tang: "CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal
    In-Context Learning", AAAI 2026, arXiv 2508.07871. F(Y) = sum over all x of max(0, max over y in Y of cos(x, y))
    + weight * sum over y in Y of (1 + cos(y, t)) / 2, where t is the mean embedding of the text behind the image. No
    code was released.

    Covered is stage 1 for one image. Stage 2 is not: it ranks the images of several demonstrations against each other,
    which needs to be told which rows are which demonstration, by attention that grows between two consecutive layers,
    which needs queries and keys of both; a site shows one span and one layer. The paper removes half of its budget in
    each stage. Positions persist.

    layer         the first layer that runs on fewer tokens, from 0; 0, what enters the language model
    keep, ratio   fraction of the visual tokens kept or removed, rounded down to whole tokens kept, but at least one;
                  0.611, what stage 1 keeps where both stages shall remove 77.8 %
    weight        of the alignment; 0.7
    """

    weight: float = 0.7

    default_keep = 0.611
    needs = ("visual", "instruction")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not 0 <= self.weight < 1e9:
            raise ArgumentError(f"{self.name}(weight={self.weight!r}): a number >= 0")

    def left(self, place: Place) -> Any:
        return max(floor(self.kept * place.free + 1e-9), 1)

    def choose(self, site: Site, tokens: Tensor, among: Tensor | None, count: Any) -> Tensor:
        others, is_text = site.text_rows()  # [B R]
        text = (precise(rows(site.hidden, others)) * is_text.unsqueeze(-1)).sum(1, keepdim=True)  # a mean's direction
        aligned = (1 + cosine_similarity(precise(tokens), text, dim=-1)) / 2  # [B V]
        chosen: Tensor = greedy_diverse(tokens, count, "cover", self.weight * aligned, None, among)
        return chosen
