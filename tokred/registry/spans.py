"""Spans that follow from others: text, prefix, instruction, images, padding, from visual rows and the padding mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["FOUND", "FROM_VISUAL", "GIVEN", "derived"]

GIVEN = ("visual", "text", "prefix", "instruction")  # what the option `spans` takes
FROM_VISUAL = ("prefix", "instruction", "images")  # what is nowhere without visual rows, unless it is given
FOUND = {
    "padding": "the attention mask",
    "text": "what is neither visual nor padding",
    "prefix": "text in front of the first visual row",
    "instruction": "text behind the last visual row",
    "images": "runs of visual rows",
}


def derived(
    name: str, visual: Tensor, valid: Tensor | None, given: dict[str, Tensor] | None = None, per_image: Any = None
) -> Tensor:
    """A span of every token of a prompt: a mask [B N]; of "images" the number of each token's image, -1 outside.

    visual     [B N] True for the tokens of images
    valid      [B N] False for padding, None where there is none
    given      masks that the user gave, for spans that follow from them
    per_image  how many visual tokens each image has; None: an image is a run of visual tokens
    """
    given = given or {}
    if name in given:
        return given[name]
    if name == "images":
        before = torch.cat([torch.zeros_like(visual[:, :1]), visual[:, :-1]], 1)
        ends = (visual & ~before).cumsum(1) - 1 if per_image is None else (visual.cumsum(1) - 1) // per_image
        return torch.where(visual, ends, -1)
    real = torch.ones_like(visual) if valid is None else valid.expand(visual.shape[0], -1)
    if name == "padding":
        return ~real
    text = given["text"] if "text" in given else real & ~visual
    if name == "prefix":
        return text & (visual.cumsum(1) == 0)
    if name == "instruction":
        return text & (visual.flip(1).cumsum(1).flip(1) == 0)
    return text
