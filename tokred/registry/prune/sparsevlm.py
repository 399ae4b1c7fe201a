"""SparseVLM: image tokens that the text's image-related words do not look at are dropped at a few depths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokred.registry.maps import rows
from tokred.registry.register import register
from tokred.registry.site import Site, precise
from tokred.registry.visual import Staircase


@register("prune", "sparsevlm")
@dataclass(frozen=True)
class SparseVLM(Staircase):
    """Rank visual tokens by the attention of those text tokens, the raters, that resemble the image most.

    Zhang, Fan, Ma, Zheng, Huang, Cheng, Gudovskiy, Okuno, Nakata, Keutzer, Zhang: "SparseVLM: Visual Token
    Sparsification for Efficient Vision-Language Model Inference", ICML 2025, arXiv 2410.04417, section 3.2. Raters are
    chosen once, from the embeddings: a text token behind the image rates if its share of softmax(X_V X_T^T), mean over
    the image, is above the mean; all text rates where none is. A visual token scores the raters' mean attention, mean
    over heads, in the layer before the cut.

    As in the released code how many stay is a table, not the paper's rank of the attention. Positions persist and
    nothing is recycled, as in its version 2.0, whose choice of 14 heads and correction for rotary decay are left out.

    keep     fractions of the first number of visual tokens that are left after each cut, rounded; the released code's
             for 192 tokens on average, 300, 200, 110 of 576
    layers   where the cuts are, as many as `keep` has; None spreads 3, 7, 16 of 32 (it scores in 2, 6, 15)
    """

    keep: list[float] | tuple[float, ...] | float = (300 / 576, 200 / 576, 110 / 576)

    needs = ("visual", "instruction", "queries", "prepared")
    paper = (3, 7, 16)

    def prepare(self, site: Site) -> Tensor:
        x = precise(site.hidden)
        text, is_text = site.text_rows()  # [B R]
        likeness = rows(x, site.candidates()) @ rows(x, text).mT  # [B V R]
        share = likeness.masked_fill(~is_text.unsqueeze(1), -torch.inf).softmax(-1).mean(1)  # [B R]
        share = share.masked_fill(~is_text, 0.0)  # NaN where a sample has no text
        mean = share.sum(-1, keepdim=True) / is_text.sum(-1, keepdim=True).clamp(min=1)
        rates = is_text & (share > mean)
        rates = torch.where(rates.any(-1, keepdim=True), rates, is_text)
        return torch.zeros_like(x[..., 0]).scatter(1, text, rates.to(x.dtype))

    def score(self, site: Site) -> Tensor:
        assert site.prepared is not None
        text, _ = site.text_rows()
        attention = site.attend(text).mean(1)  # [B R N]
        rates = site.prepared.to(attention.dtype).gather(1, text).unsqueeze(1)  # [B 1 R]
        return (rates @ attention).squeeze(1) / rates.sum(-1).clamp(min=1)
