"""TokenFLEX's pooling: LLaVA's own language model on features that loops have averaged over the windows of a grid."""

from __future__ import annotations

from math import ceil, isqrt
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.decoders import oracle
from tests.decoders.models import IMAGE, LENGTH, PATCHES, build, prompts
from tokred import Place
from tokred.errors import ArgumentError
from tokred.registry.recipe import parse_recipe
from tokred.testing.sites import make_site

pytestmark = pytest.mark.usefixtures("fresh")


def windows(patches: int, tokens: int) -> list[list[int]]:
    """The patches that each token is the mean of, of a square grid row by row: adaptive average pooling, 16 -> 9 so

    0 1 | 1 2 | 2 3   of the columns, and the same of the rows.
    """
    side, few = isqrt(patches), isqrt(tokens)
    spans = [range(i * side // few, ceil((i + 1) * side / few)) for i in range(few)]
    return [[y * side + x for y in rows for x in columns] for rows in spans for columns in spans]


def pooled(x: Tensor, visual: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """[B K C] the tokens with the image's pooled, in order, and [B K] their rows."""
    features, kept = [], []
    for sample, inside in zip(x, visual, strict=True):
        places = inside.nonzero().squeeze(-1).tolist()
        values = {row: sample[row] for row in (~inside).nonzero().squeeze(-1).tolist()}
        for window in windows(len(places), tokens):
            values[places[window[0]]] = torch.stack([sample[places[patch]] for patch in window]).mean(0)
        kept.append(torch.tensor(sorted(values)))
        features.append(torch.stack([values[row] for row in sorted(values)]))
    return torch.stack(features), torch.stack(kept)


def test_windows_overlap_where_the_grid_is_not_divided() -> None:
    assert windows(16, 4) == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert windows(16, 9)[:3] == [[0, 1, 4, 5], [1, 2, 5, 6], [2, 3, 6, 7]]


@pytest.mark.parametrize(
    ("recipe", "tokens"),
    [
        ("elastic_pool(tokens=4)", 4),
        ("elastic_pool(tokens=9)", 9),
        ("elastic_pool", 4),  # a quarter
        ("elastic_pool(ratio=0.4)", 9),
        ("elastic_pool(tokens=1)", 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tokens_are_the_means_of_their_windows(recipe: str, tokens: int, dtype: torch.dtype) -> None:
    method: Any = parse_recipe(recipe).methods[0]
    site = make_site(Place(layer=0, depth=12, tokens=31, span=16, whole=16), dtype=dtype)
    assert site.inside is not None
    wanted, rows = pooled(site.hidden.double(), site.inside, tokens)
    token_map = method.plan(site)
    reduced = token_map.reduce(method.revise(site, token_map))
    close = {"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2**-8, "atol": 0}
    torch.testing.assert_close(reduced, wanted.to(dtype), **close)
    assert token_map.pick(site.arange(0, 31).unsqueeze(-1)).squeeze(-1).tolist() == rows.tolist()
    assert method.removed(site) == 16 - tokens


def test_padding_is_no_part_of_a_mean() -> None:
    method: Any = parse_recipe("elastic_pool(tokens=4)").methods[0]
    site = make_site(Place(layer=0, depth=12, tokens=31, span=16, whole=16), dtype=torch.float64, padded=True)
    assert site.inside is not None and site.valid is not None
    places = site.inside[1].nonzero().squeeze(-1)
    real = site.valid[1, places]
    means = method.revise(site, None)[1, places]
    assert not real.all()
    for window in windows(16, 4):
        seen = [patch for patch in window if real[patch]]
        if seen:
            torch.testing.assert_close(means[window[0]], site.hidden[1, places[seen]].mean(0))


@pytest.mark.parametrize(("left", "whole"), [(12, 12), (9, 16)])
def test_what_is_no_whole_square_is_no_grid(left: int, whole: int) -> None:
    place = Place(layer=0, depth=12, tokens=31, span=left, whole=whole)
    with pytest.raises(ArgumentError, match=f"{left} image tokens of {whole} are not one square grid"):
        parse_recipe("elastic_pool()").methods[0].removed(place)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokens"), [("llava", 4), ("llava_qwen3", 9), ("internvl", 9)])
def test_a_pooled_prefill_is_the_language_model_on_pooled_features(name: str, tokens: int) -> None:
    inputs, plain = prompts(model=name), build(name, layers=3)
    visual = inputs["input_ids"] == IMAGE
    entering, rows = pooled(oracle.embeddings(plain, inputs), visual, tokens)
    short = {key: inputs[key].gather(1, rows) for key in ("attention_mask", "position_ids")}
    with torch.no_grad():
        wanted = plain.lm_head(plain.model.language_model(inputs_embeds=entering, **short).last_hidden_state)
        model = tokred.compile(build(name, layers=3), f"elastic_pool(tokens={tokens})", lower="eager", strict=True)
        output = model(**inputs)
    assert rows.shape == (3, LENGTH - PATCHES + tokens)
    assert [layer.rows.tolist() for layer in output.past_key_values.layers] == [rows.tolist()] * 3
    got = output.logits.gather(1, rows.unsqueeze(-1).expand_as(wanted))
    real = short["attention_mask"].bool()
    assert (got - wanted)[real].abs().max() < 1e-9 * wanted.abs().max()


@pytest.mark.slow
def test_four_images_are_not_one_grid_though_their_tokens_are_a_square_number() -> None:
    ids = torch.randint(3, 98, (1, 4 * PATCHES + 5), generator=torch.Generator().manual_seed(0))
    ids[:, 1 : 1 + 4 * PATCHES] = IMAGE
    pixels = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        tokred.compile(build("llava", layers=3), "elastic_pool(tokens=16)", lower="eager")(
            input_ids=ids, pixel_values=pixels
        )
    (refusal,) = [block.refusal for graph in tokred.reports().graphs for block in graph.blocks if block.method]
    assert refusal is not None and "4 images in a sample are not one square grid" in refusal.reason
