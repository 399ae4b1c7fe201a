"""AdaptInfer: image tokens that the text looks at are kept; a text token counts as much as other text looks at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokred.errors import ArgumentError
from tokred.registry.register import register
from tokred.registry.site import Place, Site
from tokred.registry.visual import VisualCut


@register("prune", "adaptinfer")
@dataclass(frozen=True)
class AdaptInfer(VisualCut):
    """Rank visual tokens by the text's attention, weighted by the attention within the text, in the layer before.

    "AdaptInfer: Adaptive Token Pruning for Vision-Language Model Inference with Dynamical Text Guidance", arXiv
    2508.06084, section 3. For each head, text token j (behind the image) weighs w_j = the sums of column and of row j
    of the text's own attention, less its diagonal; visual token v scores the sum over heads and text of w_j A_jv.

    The numbers are the released code's for LLaVA-1.5-7B at 128 tokens. Positions persist, as in its Qwen2-VL port; its
    LLaVA port numbers the remaining tokens anew.

    keep     fractions of the first number of visual tokens that are left after each cut, rounded; 290, 72, 18 of 576
    layers   where the cuts are, as many as `keep` has; None spreads them as 2, 11, 21 of 32 (it cuts behind 1, 10, 20)
    """

    keep: list[float] | tuple[float, ...] | float = (290 / 576, 72 / 576, 18 / 576)

    needs = ("visual", "instruction", "queries")

    def __post_init__(self) -> None:
        numbers = all(type(share) in (int, float) and 0 <= share <= 1 for share in self.shares)
        if not self.shares or not numbers or sorted(self.shares, reverse=True) != list(self.shares):
            raise ArgumentError(
                f"{self.name}(keep={self.keep!r}): fractions in [0, 1] that do not grow from cut to cut"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """`keep`, one number a cut."""
        return (self.keep,) if isinstance(self.keep, (int, float)) else tuple(self.keep)

    def default_layers(self, depth: int) -> list[int]:
        paper = (2, 11, 21)
        wanted = [paper[min(cut, 2)] if cut < 3 else 21 + 3 * (cut - 2) for cut in range(len(self.shares))]
        return sorted({min(max(round(layer * depth / 32), 1), depth - 1) for layer in wanted})

    def left(self, place: Place) -> Any:
        cuts = sum(self.acts_on(layer, place.depth, "") for layer in range(place.layer + 1))
        return round(self.shares[min(cuts, len(self.shares)) - 1] * place.whole)

    def score(self, site: Site) -> Tensor:
        rows, is_text = site.text_rows()  # [B R]
        attention = site.attend(rows) * is_text[:, None, :, None]  # [B H R N]
        columns = rows[:, None, None].expand(-1, attention.shape[1], rows.shape[1], -1)
        inner = attention.gather(3, columns) * is_text[:, None, None]  # [B H R R]
        weight = inner.sum(2) + inner.sum(3) - torch.diagonal(inner, dim1=2, dim2=3)  # [B H R]
        return (weight.unsqueeze(2) @ attention).squeeze(2).sum(1)
