"""HiDrop: image tokens enter late, become fewer in steps, and leave early."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokred.registry.register import register
from tokred.registry.site import Site
from tokred.registry.visual import Staircase


@register("prune", "hidrop")
@dataclass(frozen=True)
class HiDrop(Staircase):
    """The first layers run on text alone, then all visual tokens enter; the last token's attention drops them in steps.

    Wu, Fan, Dai, Tong, Ma, Shen: "HiDrop: Hierarchical Vision Token Reduction in MLLMs via Late Injection, Concave
    Pyramid Pruning, and Early Exit", ICLR 2026, arXiv 2602.23699. Written from the paper. A visual token enters as it
    was in front of layer 0 and keeps its position; it scores the attention of the prompt's last token, mean over heads,
    in the layer that would drop it. The paper finds the layers by a measure on data and trains models with this
    and a differentiable top-k; without training more is lost.

    keep     fractions of the visual tokens that each step leaves, rounded. A first 0 is late injection: then comes 1,
             where they enter. The default's 1/2 to 1/32 are this package's: the mean over 32 layers is 11.2 % of the
             visual tokens, near the paper's 88.9 % compression
    layers   where the steps are, as many as `keep` has; None spreads the paper's for LLaVA-1.5-7B: from 0 without
             them, in at 9, fewer from 10, 14, 16, 18, and none from 25 of 32
    """

    keep: list[float] | tuple[float, ...] | float = (0.0, 1.0, 1 / 2, 1 / 8, 1 / 16, 1 / 32, 0.0)

    probe = "next"
    paper = (0, 9, 10, 14, 16, 18, 25)
    earliest = 0
    wanted = "fractions in [0, 1] that do not grow from step to step, but from a first 0 to 1"

    def descends(self, shares: list[float]) -> bool:
        late = len(shares) > 1 and shares[0] == 0 < shares[1]
        return super().descends(shares[1:] if late else shares) and (not late or shares[1] == 1)

    @property
    def late(self) -> bool:
        """Whether the first layers run without the visual tokens."""
        return len(self.shares) > 1 and self.shares[:2] == (0, 1)

    def steps(self, depth: int) -> list[int]:
        steps = super().steps(depth)
        if self.layers is not None or not self.late:
            return steps
        enter = min(max(steps[1], 1), depth - 1)
        return [0, enter, *(min(max(step, enter + 1), depth - 1) for step in steps[2:])]

    def restores(self, layer: int, depth: int) -> bool:
        return self.late and layer == self.steps(depth)[1] and self.share(layer, depth) == 1

    def needs_at(self, layer: int, depth: int) -> tuple[str, ...]:
        return self.needs if 0 < self.share(layer, depth) < 1 else ("visual",)

    def score(self, site: Site) -> Tensor:
        return site.attention(row=-1).mean(1)
