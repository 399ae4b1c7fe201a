"""Correlation: which tokens of a sample's crops stay, against transformers' own vision tower, crop after crop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.decoders import oracle
from tests.decoders.diverse import encoder
from tests.decoders.models import IMAGE, PATCHES, SPAN, build, prompts
from tokred.errors import ArgumentError
from tokred.registry.recipe import parse_recipe

CROPS, BEFORE, TEXT = 3, 2, 5
LENGTH = 6 + BEFORE + CROPS * PATCHES + TEXT  # six for padding
SIMILAR, REPEATS, LOCAL, KEEP = 0.5, 3, 0.4, 0.4
RECIPE = f"correlation(keep={KEEP}, similar={SIMILAR}, repeats={REPEATS}, local={LOCAL}, shallow=0.4)"


pytestmark = pytest.mark.usefixtures("fresh")


def documents(batch: int = 3) -> dict[str, Tensor]:
    """Prompts with 0, 3, 6 tokens of padding in front, each about three crops of an image."""
    generator = torch.Generator().manual_seed(5)
    padding = 3 * (torch.arange(batch) % 3).unsqueeze(1)
    mask = (torch.arange(LENGTH) >= padding).long()
    ids = torch.randint(3, 98, (batch, LENGTH), generator=generator) * mask
    ids = ids.scatter(1, padding + BEFORE + torch.arange(CROPS * PATCHES), IMAGE)
    pixels = torch.randn(batch * CROPS, 3, 32, 32, generator=generator, dtype=torch.float64)
    flat = torch.tensor([0.1, 0.6, 1.0]).repeat(batch)[:, None, None, None]  # some crops are nearly empty
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "pixel_values": pixels * flat}


def shallow_attention(model: Any, pixels: Tensor, head: int) -> Tensor:
    """[I P] of the tower's first layer: what the class token, or else the mean token, gives to each patch."""
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tower(pixels, output_attentions=True).attentions[0]
    tower.set_attn_implementation("sdpa")
    return (weights[:, :, 0] if head else weights.mean(2)).mean(1)[:, head:]


def kept_patches(model: Any, pixels: Tensor, head: int, batch: int) -> tuple[list[list[int]], list[list[int]]]:
    """For each sample the numbers of the patches that stay, counted through its crops, and how many of each crop."""
    _, weights, keys = encoder(model, pixels)
    deep = (weights[:, :, 0] if head else weights.mean(2)).mean(1)[:, head:]
    shallow = shallow_attention(model, pixels, head)
    kept, counts = [], []
    for sample in range(batch):
        crops = range(sample * CROPS, (sample + 1) * CROPS)
        densities = []
        for crop in crops:
            key = keys[crop].mean(1)[head:]
            unique = 0
            for i in range(PATCHES):
                like = [float(torch.cosine_similarity(key[i], key[j], dim=0)) for j in range(PATCHES) if j != i]
                unique += sum(cosine > SIMILAR for cosine in like) < REPEATS
            densities.append(max(unique, 1))
        quota = [0] * CROPS
        for _ in range(round(KEEP * CROPS * PATCHES)):
            open_crops = [crop for crop in range(CROPS) if quota[crop] < PATCHES]
            quota[max(open_crops, key=lambda crop: densities[crop] / (quota[crop] + 0.5))] += 1
        rows: list[int] = []
        for number, crop in enumerate(crops):
            by_deep = sorted(range(PATCHES), key=lambda patch: -float(deep[crop, patch]))
            chosen = by_deep[: quota[number] - round(LOCAL * quota[number])]
            others = [patch for patch in range(PATCHES) if patch not in chosen]
            others.sort(key=lambda patch: -float(shallow[crop, patch]))
            chosen += others[: quota[number] - len(chosen)]
            rows += [number * PATCHES + patch for patch in sorted(chosen)]
        kept.append(rows)
        counts.append(quota)
    return kept, counts


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head"), [("llava", 1), ("llava_qwen3", 0)])
def test_crops_keep_the_tokens_that_the_paper_s_steps_choose(name: str, head: int) -> None:
    inputs = documents()
    plain = build(name, layers=3)
    kept, counts = kept_patches(plain, inputs["pixel_values"], head, 3)
    assert len({tuple(sorted(quota)) for quota in counts}) > 1, "every sample shares its tokens out alike"
    assert all(len(set(quota)) > 1 for quota in counts), "every crop keeps as many tokens"
    visual = inputs["input_ids"] == IMAGE
    gone = visual.clone()
    for sample, patches in enumerate(kept):
        gone[sample, visual[sample].nonzero().squeeze(-1)[patches]] = False

    plain.set_attn_implementation({"text_config": "oracle"})
    with torch.no_grad(), oracle.masked({0: gone}):
        wanted = plain(**inputs, use_cache=False).logits
        output = tokred.compile(build(name, layers=3), RECIPE, lower="eager", strict=True)(**inputs)
    left = [row.nonzero().squeeze(-1).tolist() for row in ~gone]
    assert [layer.rows.tolist() for layer in output.past_key_values.layers] == [left] * 3
    real = ~gone & inputs["attention_mask"].bool()
    assert (output.logits[real] - wanted[real]).abs().max() < 1e-9 * wanted.abs().max()


@pytest.mark.slow
def test_without_an_encoder_of_its_patches_nothing_is_chosen() -> None:
    inputs = prompts()
    model = build("llama", layers=3)
    compiled = tokred.compile(model, RECIPE, lower="eager", spans={"visual": SPAN})
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits[real], model(**inputs).logits[real], rtol=1e-9, atol=1e-9)
    refusals = [block.refusal for graph in tokred.reports().graphs for block in graph.blocks if block.refusal]
    assert [refusal.code for refusal in refusals] == ["no-vision-tower"]


@pytest.mark.parametrize("argument", ["similar=1", "similar='x'", "repeats=0", "local=1.5", "shallow=-0.1", "keep=2"])
def test_arguments_out_of_range_are_errors(argument: str) -> None:
    with pytest.raises(ArgumentError, match=argument.partition("=")[0]):
        parse_recipe(f"correlation({argument})")
