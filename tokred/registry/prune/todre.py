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

    The first token kept, the pivot, is the one with the most class attention in the vision encoder's last layer, mean
    over heads: the last of the layers that the features went through. An encoder without a class token counts the mean
    attention of all its tokens; where none shows, the pivot is the token nearest the mean of all. The paper takes a
    random one in these two cases, and finds it nearly as good.

    The paper drops the rest when the attention between text and image in a layer near 7/8 of the depth falls below a
    threshold, at run time. A compiled graph has one shape: here they are dropped there always, or never. Positions
    persist.

    layer         the first layer that runs on fewer tokens, from 0; 0, what enters the language model
    keep, ratio   fraction of the visual tokens kept or removed there; 0.1
    exit          the fraction of the depth at which no visual tokens are left, rounded down to a layer; None is never
    pivot         "class", as above; "mean", the token nearest the mean of all, whether an encoder shows or not
    layers        None is `layer` and the layer of `exit`; others keep `keep` before that layer, nothing from it on
    """

    exit: float | None = 7 / 8
    pivot: str = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.exit, (int, float)) and not isinstance(self.exit, bool)
        if self.exit is not None and not (number and 0 < self.exit <= 1):
            raise ArgumentError(f"{self.name}(exit={self.exit!r}): a fraction of the depth in (0, 1], or None")
        if self.pivot not in ("class", "mean"):
            raise ArgumentError(f"{self.name}(pivot={self.pivot!r}): 'class' or 'mean'")

    def wants_at(self, layer: int, depth: int) -> tuple[str, ...]:
        return ("tower",) if self.pivot == "class" and layer < self.exit_layer(depth) else ()

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
        tower = site.tower if self.pivot == "class" else None
        value = _nearness(tokens, among) if tower is None else tower.attention  # [B V]
        first = (value if among is None else value.where(among, -torch.inf)).argmax(-1)
        chosen: Tensor = greedy_diverse(tokens, count, "sum", None, first, among)
        return chosen


def _nearness(tokens: Tensor, among: Tensor | None) -> Tensor:
    """[B V] the cosine of each token to the mean of all, times the length of that."""
    wide = precise(tokens)
    mean = (wide if among is None else wide * among.unsqueeze(-1)).sum(1, keepdim=True)
    nearness: Tensor = (wide * mean).sum(-1) / wide.norm(dim=-1).clamp(min=1e-12)
    return nearness
