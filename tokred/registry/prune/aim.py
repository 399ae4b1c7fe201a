"""AIM: image tokens are merged in front of the language model, and dropped inside by a PageRank over its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokred.registry.maps import Merge, TokenMap, joined, rows
from tokred.registry.register import register
from tokred.registry.site import Place, Site, precise
from tokred.registry.visual import Staircase


@register("prune", "aim")
@dataclass(frozen=True)
class AIM(Staircase):
    """Merge like visual tokens in front of layer 0; then, layer by layer, keep those that attention flows to.

    Zhong, Liu, Li, Wang: "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning", ICCV 2025, arXiv
    2412.03248, section 3. A round of merging is ToMe's with r = half of the tokens and cosine similarity of what enters
    layer 0: every other token joins the one that is most like it, plain means. Importance is sqrt(mean over heads of
    d^2), d five steps of PageRank without damping from a uniform start over M = softmax(logits / 0.1) of all tokens in
    the layer before: d M^5, streamed, M is never a matrix.

    The released code only masks what it drops, and a masked token still hands on what it was given; here rows are gone
    from the layer's PageRank too. It merges each frame by itself and numbers the tokens anew behind that; here all
    image tokens of a sample are one set, and a merged token has the position of the one that the others joined.

    keep     fractions of the visual tokens that are left: the first by merging, a half, a quarter and so on, or 1; the
             others by dropping, of those that merging left, rounded. The released code's
    layers   None is 0 for merging and 15 to 22 of 28 (it scores in 14 to 21)
    """

    keep: list[float] | tuple[float, ...] | float = (1 / 4, *(1 - step / 8 for step in range(1, 9)))

    paper = (0, 15, 16, 17, 18, 19, 20, 21, 22)
    paper_depth = 28
    earliest = 0
    merges = "visual"
    causal_safe = False
    temperature = 0.1
    iterations = 5
    wanted = "first 1 or a half, a quarter and so on, then fractions in [0, 1] that do not grow"

    def descends(self, shares: list[float]) -> bool:
        halvings = shares[0] > 0 and (1 / shares[0]).is_integer() and int(1 / shares[0]).bit_count() == 1
        return halvings and super().descends(shares[1:])

    def steps(self, depth: int) -> list[int]:
        first, *others = super().steps(depth)
        return [first, *(min(max(step, first + 1), depth - 1) for step in others)]

    def needs_at(self, layer: int, depth: int) -> tuple[str, ...]:
        return ("visual",) if layer == self.steps(depth)[0] else self.needs

    def merged(self, whole: Any) -> Any:
        """How many of the visual tokens merging leaves: a half, rounded up, in each round."""
        for _ in range(int(1 / self.shares[0]).bit_length() - 1):
            whole = whole - whole // 2
        return whole

    def left(self, place: Place) -> Any:
        if place.layer == self.steps(place.depth)[0]:
            return self.merged(place.free)
        return round(self.share(place.layer, place.depth) * self.merged(place.whole))

    def plan(self, site: Site) -> TokenMap:
        return self.merge(site) if site.layer == self.steps(site.depth)[0] else super().plan(site)

    def merge(self, site: Site) -> Merge:
        """Rounds of bipartite matching (ToMe, section 3) among the visual tokens, as one map of all tokens."""
        places = site.candidates()  # [B V]
        x, alive = precise(rows(site.hidden, places)), site.members().gather(1, places)
        both: Merge | None = None
        while x.shape[1] > self.left(site):
            unit = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            best, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)  # [B A]
            src = best.topk(x.shape[1] // 2, dim=1).indices
            merge = Merge.mean(*joined(2 * src, 2 * partner.gather(1, src) + 1, x.shape[1]), alive)
            assert merge.size is not None
            x, alive = merge.reduce(x), merge.size.clamp(max=1)  # means of means: a row weighs one in each round
            both = merge if both is None else both.then(merge)
        assert both is not None
        keep, src = places.gather(1, both.keep), places.gather(1, both.src)
        everywhere = torch.ones_like(site.members()).scatter(1, keep, both.keep_weight)  # [B N]
        order, src, into = joined(src, keep.gather(1, both.into), site.tokens)
        return Merge(order, src, into, everywhere.gather(1, order), both.src_weight)

    def score(self, site: Site) -> Tensor:
        start = site.members()  # [B N]
        start = start / start.sum(-1, keepdim=True)
        return site.flow(start, temperature=self.temperature, steps=self.iterations).square().mean(1).sqrt()
