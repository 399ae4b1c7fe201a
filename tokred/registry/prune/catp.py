"""CATP: image tokens that stand for many others, and for what the text says, go into the language model; where the
prompt has several images, more are dropped there as the question makes them matter less."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokred.backends.kernels.greedy import greedy_diverse
from tokred.errors import ArgumentError
from tokred.registry.maps import partition, rows
from tokred.registry.method import check_int, keep_fraction
from tokred.registry.register import register
from tokred.registry.site import Place, Site, precise
from tokred.registry.visual import DiverseCut


@register("prune", "catp")
@dataclass(frozen=True)
class CATP(DiverseCut):
    """Keep visual tokens that stand for all and fit the text; with several images, drop more behind two early layers.

    Li, Yang, Shen, Han, Xu, Tang: "CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal
    In-Context Learning", AAAI 2026, arXiv 2508.07871. No code was released. Positions persist.

    Stage 1, for each image, chooses Y greedily: F(Y) = sum over all its x of max(0, max over y in Y of cos(x, y)) +
    weight * sum over y in Y of (1 + cos(y, t)) / 2, where t is the mean embedding of the text between it and the next
    image.

    Stage 2 is for prompts that show images of examples, the context, before the one that is asked about. Behind layer
    `second`, K, all tokens of the context together are ranked by max(0, A^K - A^(K-1)) + affinity * cos(h, q): A is the
    attention of the prompt's last token, mean over heads, h what layer K makes of the token, and q the mean of h over
    everything from the last image on. Behind layer K + 1 the last image's tokens are ranked by their cosine to the mean
    of the context's that are left. Each stage removes half of what is removed in all, of the context and of the last
    image alike. Which image a token belongs to is told by `images` alone: each sample has as many, all of one size, and
    stage 1 leaves as many of each.

    layer         the first layer that runs on fewer tokens, from 0; 0, what enters the language model
    keep, ratio   fraction of the visual tokens kept or removed, rounded down to whole tokens kept, but at least one.
                  With one image 0.611, what stage 1 keeps where both stages shall remove 77.8 %; with more 0.222
    weight        of the alignment; 0.7
    images        how many images each sample has; stage 2 is for more than one
    second        K; None spreads the paper's 6 of 32
    affinity      of a context token to the question; 0.6
    """

    weight: float = 0.7
    images: int = 1
    second: int | None = None
    affinity: float = 0.6

    probe = "previous"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight", "affinity"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
                raise ArgumentError(f"{self.name}({name}={value!r}): a number >= 0")
        check_int(self.name, "images", self.images, 1)
        if self.second is not None:
            check_int(self.name, "second", self.second, max(self.layer, 1))
        if self.images > 1 and self.layers is not None:
            raise ArgumentError(f"{self.name}(layers={self.layers!r}): with several images, give layer and second")

    @property
    def kept(self) -> float:
        return keep_fraction(self.name, self.keep, self.ratio, 0.611 if self.images == 1 else 0.222)

    def default_layers(self, depth: int) -> list[int]:
        if self.images == 1:
            return [self.layer]
        spread = max(round(6 * depth / 32), self.layer, 1) if self.second is None else self.second
        return [self.layer, spread + 1, spread + 2]

    def needs_at(self, layer: int, depth: int) -> tuple[str, ...]:
        ranks = self.images > 1 and layer == self.default_layers(depth)[1]
        return ("visual", "queries", "earlier") if ranks else self.needs

    def counts(self, place: Place) -> tuple[int, int, int]:
        """How many tokens stage 1 leaves of each image, and stage 2 of the context and of the last image."""
        each, rest = divmod(place.whole, self.images)
        if rest:
            raise ArgumentError(
                f"{self.name}(images={self.images}): {place.whole} image tokens are not as many of each"
            )
        first = max(floor((1 + self.kept) / 2 * each + 1e-9), 1)
        context = max(floor(self.kept * each * (self.images - 1) + 1e-9), 1)
        return first, min(context, first * (self.images - 1)), min(max(floor(self.kept * each + 1e-9), 1), first)

    def left(self, place: Place) -> Any:
        if self.images == 1:
            return max(floor(self.kept * place.free + 1e-9), 1)
        first, context, last = self.counts(place)
        steps = [place.whole, first * self.images, context + first, context + last]
        cut = self.default_layers(place.depth).index(place.layer)
        if place.free != steps[cut]:
            found = f"{place.free} image tokens where its own cuts leave {steps[cut]} of {place.whole}"
            raise ArgumentError(f"{self.name}(images={self.images}): {found}: nothing else may drop them")
        return steps[cut + 1]

    def choose(self, site: Site, tokens: Tensor, among: Tensor | None, count: Any) -> Tensor:
        cut = 0 if self.images == 1 else self.default_layers(site.depth).index(site.layer)
        if cut == 0:
            return self.stand_for_others(site, tokens, among, count)
        first, context, last = self.counts(site)
        begin = site.free - first  # the last image's first token
        score = self.asked_for(site, tokens, begin) if cut == 1 else _like_the_mean(tokens, begin, among)
        if among is not None:
            score = score.masked_fill(~among, -torch.inf)
        ranked, stays = (slice(begin), slice(begin, None)) if cut == 1 else (slice(begin, None), slice(begin))
        numbers = site.arange(0, site.free)
        best = score[:, ranked].topk(context if cut == 1 else last, dim=1).indices
        return torch.cat([numbers[:, ranked].gather(1, best), numbers[:, stays]], 1)

    def stand_for_others(self, site: Site, tokens: Tensor, among: Tensor | None, count: Any) -> Tensor:
        """[B count] stage 1: image by image, each a sample of its own for the greedy choice."""
        pieces = precise(tokens).unflatten(1, (self.images, -1))  # [B I S C]
        aligned = (1 + cosine_similarity(pieces, self.texts(site).unsqueeze(2), dim=-1)) / 2  # [B I S]
        among = None if among is None else among.reshape(-1, pieces.shape[2])
        each = (pieces.flatten(0, 1), count // self.images, "cover", self.weight * aligned.flatten(0, 1), None, among)
        chosen = greedy_diverse(*each).unflatten(0, (-1, self.images))  # [B I K]
        start = torch.arange(self.images, device=tokens.device).unsqueeze(-1) * pieces.shape[2]
        numbers: Tensor = chosen + start
        return numbers.flatten(1)

    def texts(self, site: Site) -> Tensor:
        """[B I C] the direction of the mean of the text between each image and the next."""
        visual = site.candidates().unflatten(1, (self.images, -1))  # [B I S]
        _, others = partition(visual.flatten(1), site.tokens)  # [B R]
        begins = torch.cat([visual[:, 1:, 0], torch.full_like(visual[:, :1, 0], site.tokens)], 1)
        place = others.unsqueeze(1)  # [B 1 R]
        belongs = (place > visual[:, :, -1:]) & (place < begins.unsqueeze(-1))  # [B I R]
        weight = belongs * site.members().gather(1, others).unsqueeze(1)
        stream = precise(rows(site.hidden, others))
        mean: Tensor = weight.to(stream.dtype) @ stream
        return mean

    def asked_for(self, site: Site, tokens: Tensor, begin: Any) -> Tensor:
        """[B V] how much more the last token looks at each visual token than it did a layer before, and how much that
        resembles what is asked."""
        assert site.earlier is not None
        places = site.candidates()
        now, then = (seen.attention(row=-1).mean(1).gather(1, places) for seen in (site, site.earlier))
        asks = torch.arange(site.tokens, device=places.device) >= places[:, begin : begin + 1]  # [B N]
        stream = precise(site.hidden)
        question = (asks * site.members()).to(stream.dtype).unsqueeze(1) @ stream  # [B 1 C] the mean's direction
        rises: Tensor = (now - then).clamp(min=0)
        return rises + self.affinity * cosine_similarity(precise(tokens), question, dim=-1)


def _like_the_mean(tokens: Tensor, begin: Any, among: Tensor | None) -> Tensor:
    """[B V] cosines to the mean of the first `begin` tokens, padding apart."""
    wide = precise(tokens)
    real = wide if among is None else wide * among.unsqueeze(-1)
    return cosine_similarity(wide, real[:, :begin].sum(1, keepdim=True), dim=-1)
