"""Is an attention causal? Masks that depend on what kind of token, or on which images, their inputs say there are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compiler.graphs import captured
from tokred.compiler.axes import Axes
from tokred.compiler.blocks import find_blocks
from tokred.compiler.causal import is_causal

N = 6


def causal(model: Any, *inputs: Tensor) -> bool:
    (graph,) = captured(model, *inputs)
    (block,) = find_blocks(graph, Axes(graph.graph)).attentions
    return is_causal(block)


def attend(x: Tensor, mask: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
    return x + F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask).transpose(1, 2).flatten(2)


def earlier() -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).tril()


def test_words_are_causal_though_tokens_of_one_image_see_each_other() -> None:
    def model(x: Tensor, kinds: Tensor) -> Tensor:  # Gemma 3: kind 1 is an image
        image = (kinds[:, :, None] == 1) & (kinds[:, None, :] == 1)
        return attend(x, (earlier() | image)[:, None])

    assert causal(model, torch.randn(2, N, 8), torch.zeros(2, N, dtype=torch.long))


def test_a_padding_mask_hides_no_later_keys() -> None:
    def model(x: Tensor, real: Tensor) -> Tensor:
        return attend(x, real.bool()[:, None, None].expand(-1, 1, N, -1) & torch.ones(N, N, dtype=torch.bool))

    assert not causal(model, torch.randn(2, N, 8), torch.ones(2, N, dtype=torch.long))


def test_padding_beside_a_causal_mask_changes_nothing() -> None:
    def model(x: Tensor, real: Tensor) -> Tensor:
        return attend(x, real.bool()[:, None, None] & earlier())

    assert causal(model, torch.randn(2, N, 8), torch.ones(2, N, dtype=torch.long))


def test_images_of_zeros_are_left_out_and_say_nothing() -> None:
    def model(pixels: Tensor) -> Tensor:  # Idefics3: which images are real is data
        x = pixels[(pixels == 0).sum((1, 2)) != pixels[0].numel()]
        mask = torch.ones(x.shape[0], 1, N, N, dtype=torch.bool)
        return attend(x, mask)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert not causal(model, torch.randn(2, N, 8))
