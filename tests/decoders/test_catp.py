"""CATP where a prompt has several images: which text is whose, what stage 2 needs, and two images in LLaVA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import tokred
from tests.decoders import diverse, oracle
from tests.decoders.models import IMAGE, PATCHES, SPAN, build, prompts
from tokred import Place, Site
from tokred.errors import ArgumentError
from tokred.registry.recipe import parse_recipe
from tokred.registry.visual import VisualCut
from tokred.testing.sites import make_site

pytestmark = pytest.mark.usefixtures("fresh")


def method(recipe: str) -> Any:
    return parse_recipe(recipe).methods[0]


def two_images(batch: int = 3) -> dict[str, Tensor]:
    """Padding, a word, an image, two words, an image, four words."""
    generator = torch.Generator().manual_seed(5)
    length = 2 * PATCHES + 13
    ids = torch.randint(3, 98, (batch, length), generator=generator)
    padding = 3 * (torch.arange(batch) % 3).unsqueeze(1)
    mask = (torch.arange(length) >= padding).long()
    patches = torch.cat([torch.arange(PATCHES), PATCHES + 2 + torch.arange(PATCHES)])
    pixels = torch.randn(2 * batch, 3, 32, 32, generator=generator, dtype=torch.float64)
    places = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return {"input_ids": (ids * mask).scatter(1, padding + 1 + patches, IMAGE), "pixel_values": pixels} | places


@pytest.mark.slow
def test_two_images_in_a_prompt_are_pruned_as_the_reference_does() -> None:
    inputs, plain = two_images(), build("llava")
    plain.set_attn_implementation({"text_config": "oracle"})
    visual = inputs["input_ids"] == IMAGE
    dropped = diverse.catp(0.34, 5.0, 2, 1, 0.3)(plain, inputs, visual)
    with torch.no_grad(), oracle.masked(dropped):
        wanted = plain(**inputs, use_cache=False).logits
        recipe = "catp(keep=0.34, images=2, second=1, weight=5, affinity=0.3)"
        output = tokred.compile(build("llava"), recipe, lower="eager", strict=True)(**inputs)
    left, found = torch.ones_like(visual), []
    for layer in range(5):
        left = left & ~dropped.get(layer, torch.zeros_like(visual))
        found.append([row.nonzero().squeeze(-1).tolist() for row in left])
    assert [layer.rows.tolist() for layer in output.past_key_values.layers] == found
    assert [len(rows[0]) for rows in found] == [13 + 20, 13 + 20, 13 + 15, 13 + 10, 13 + 10]
    real = left & inputs["attention_mask"].bool()
    assert (output.logits - wanted)[real].abs().max() < 1e-9 * wanted.abs().max()


def test_an_image_s_text_reaches_to_the_next_one() -> None:
    site = make_site(Place(layer=0, depth=12, tokens=31, span=16, whole=16), dtype=torch.float64, padded=True)
    assert site.inside is not None and site.valid is not None
    found = method("catp(images=4)").texts(site)
    for sample in range(3):
        rows = site.inside[sample].nonzero().squeeze(-1).tolist()
        for image in range(4):
            after = rows[4 * image + 4] if image < 3 else 31
            text = [row for row in range(rows[4 * image + 3] + 1, after) if site.valid[sample, row]]
            torch.testing.assert_close(found[sample, image], site.hidden[sample, text].sum(0))


@pytest.mark.parametrize(
    ("recipe", "counts"),
    [
        ("catp(images=5)", (351, 511, 127)),  # 0.611 of 576; 0.222 of 4 x 576, of 576
        ("catp(images=2, keep=0.5)", (1080, 720, 720)),
        ("catp(images=5, ratio=0)", (576, 2304, 576)),
        ("catp(images=1440, keep=0.9)", (1, 1439, 1)),  # of images of two tokens, no more than are left
    ],
)
def test_each_stage_removes_half(recipe: str, counts: tuple[int, int, int]) -> None:
    place = Place(layer=0, depth=32, tokens=2980, span=2880, whole=2880)
    assert method(recipe).counts(place) == counts
    assert method(recipe).left(place) == counts[0] * method(recipe).images


def test_stage_2_cuts_behind_two_layers() -> None:
    assert method("catp(images=5)").default_layers(32) == [0, 7, 8]
    assert method("catp(images=5)").default_layers(5) == [0, 2, 3]
    assert method("catp(images=5, second=10)").default_layers(40) == [0, 11, 12]
    assert method("catp()").default_layers(32) == [0]
    steps = [(0, 2880, 1125), (7, 1755, 1755 - 511 - 351), (8, 862, 351 - 127)]
    for layer, span, removed in steps:
        place = Place(layer=layer, depth=32, tokens=span + 100, span=span, whole=2880)
        assert method("catp(images=5)").removed(place) == removed


@pytest.mark.parametrize("wrong", ["images=0", "images=1.5", "second=0", "affinity=-1", "weight=True", "layers=[0, 2]"])
def test_values_out_of_range(wrong: str) -> None:
    with pytest.raises(ArgumentError, match=wrong.split("=")[0]):
        method(f"catp({'' if wrong.startswith('images') else 'images=2, '}{wrong})")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "code", "reason"),
    [
        ("catp(images=5, second=1)", "method-raised", "12 image tokens are not as many of each"),
        ("fastv(layer=1, keep=0.5) + catp(images=2, second=1)", "method-raised", "nothing else may drop them"),
    ],
)
def test_what_does_not_fit_is_refused(recipe: str, code: str, reason: str) -> None:
    with torch.no_grad():
        tokred.compile(build("llama"), recipe, lower="eager", spans={"visual": SPAN})(**prompts(model="llama"))
    refusals = [block.refusal for graph in tokred.reports().graphs for block in graph.blocks if block.refusal]
    assert {refusal.code for refusal in refusals} == {code}
    assert all(reason in refusal.reason for refusal in refusals)


@dataclass(frozen=True)
class Rises(VisualCut):
    """Keeps half: what the last token looks at more than a layer before."""

    keep: float = 0.5

    name: ClassVar[str] = "rises"
    needs = ("visual", "queries", "earlier")

    def left(self, place: Place) -> int:
        return round(self.keep * place.free)

    def score(self, site: Site) -> Tensor:
        assert site.earlier is not None
        return (site.attention(row=-1) - site.earlier.attention(row=-1)).mean(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "layer", "code", "reason"),
    [
        ("", 1, "no-previous-layer", "two layers before are compared, and there is one"),
        ("fastv(layer=2, keep=0.5)", 3, "method-raised", "tokens were removed between the two layers"),
        ("fastv(layer=2, keep=0.5)", 4, "", ""),
    ],
)
def test_two_layers_are_compared_on_the_same_tokens_or_not_at_all(
    first: str, layer: int, code: str, reason: str
) -> None:
    methods = [*(parse_recipe(first).methods if first else ()), Rises(layers=[layer])]
    with torch.no_grad():
        model = tokred.compile(build("llama"), methods, lower="eager", spans={"visual": SPAN})  # type: ignore[arg-type]
        model(**prompts(model="llama"))
    (block,) = [b for graph in tokred.reports().graphs for b in graph.blocks if b.method and "rises" in b.method]
    assert (block.refusal.code if block.refusal else "") == code
    assert reason in (block.refusal.reason if block.refusal else "")
