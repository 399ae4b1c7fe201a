"""ToDRE: image tokens that resemble each other least go into the language model; near its end, none are left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokred.backends.kernels.greedy import greedy_diverse
from tokred.errors import ArgumentError
from tokred.registry.register import register
from tokred.registry.site import Place, Site, precise
from tokred.registry.visual import DiverseCut


@register("prune", "todre")
@dataclass(frozen=True)
class ToDRE(DiverseCut):
    """Keep the visual tokens with the least cosine to those already kept, summed; drop all of them at a late layer.

    Li, Yang, Zhang, Shao, Lu: "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", arXiv
    2505.18757v2, greedy max-sum diversification (version 1 had k-center instead). No code was released.

    The paper starts from the token with the most class attention in the vision tower's last layer, and finds a random
    one nearly as good; this starts from the token nearest the mean of all, which every model has. The paper drops the
    rest when the attention between text and image in a layer near 7/8 of the depth falls below a threshold, at run
    time. A compiled graph has one shape: here they are dropped there always, or never. Positions persist.

    layer         the first layer that runs on fewer tokens, from 0; 0, what enters the language model
    keep, ratio   fraction of the visual tokens kept or removed there; 0.1
    exit          the fraction of the depth at which no visual tokens are left, rounded down to a layer; None is never
    layers        None is `layer` and the layer of `exit`; others keep `keep` before that layer, nothing from it on
    """

    exit: float | None = 7 / 8

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.exit, (int, float)) and not isinstance(self.exit, bool)
        if self.exit is not None and not (number and 0 < self.exit <= 1):
            raise ArgumentError(f"{self.name}(exit={self.exit!r}): a fraction of the depth in (0, 1], or None")

    def exit_layer(self, depth: int) -> int:
        """The layer from which on no visual tokens are left; `depth` where there is none behind `layer`."""
        layer = depth if self.exit is None else int(self.exit * depth + 1e-9)
        return layer if layer > self.layer else depth

    def default_layers(self, depth: int) -> list[int]:
        return [self.layer, self.exit_layer(depth)]

    def left(self, place: Place) -> Any:
        return 0 if place.layer >= self.exit_layer(place.depth) else super().left(place)

    def choose(self, site: Site, tokens: Tensor, among: Tensor | None, count: Any) -> Tensor:
        if site.layer >= self.exit_layer(site.depth):
            return site.arange(0, 0)
        chosen: Tensor = greedy_diverse(tokens, count, "sum", None, _nearest_the_mean(tokens, among), among)
        return chosen


def _nearest_the_mean(tokens: Tensor, among: Tensor | None) -> Tensor:
    """[B] the token with the largest cosine to the mean of all."""
    wide = precise(tokens)
    mean = (wide if among is None else wide * among.unsqueeze(-1)).sum(1, keepdim=True)
    cosine = (wide * mean).sum(-1) / wide.norm(dim=-1).clamp(min=1e-12)  # [B V], times the length of the mean
    nearest: Tensor = (cosine if among is None else cosine.where(among, -torch.inf)).argmax(-1)
    return nearest
