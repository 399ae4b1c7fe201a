"""Mixture of depths against the mask oracle: tokens that go around a layer are keys that nobody sees in it alone."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import tokred
from tests.decoders import oracle
from tests.decoders.models import DECODERS, IMAGE, LENGTH, VLMS, build, prompts
from tests.decoders.test_mask_oracle import options, reference, visual
from tests.one_capture import Switch
from tokred import Place
from tokred.compiler.options import parse_options
from tokred.errors import ArgumentError, StrictError
from tokred.generation import PrunedLayer, with_pruned_caches
from tokred.registry.prune.mixture_of_depths import MixtureOfDepths
from tokred.registry.recipe import parse_recipe

pytestmark = pytest.mark.usefixtures("fresh")


def routers(layers: int = 5, channels: int = 64) -> dict[str, Tensor]:
    """Small enough that tanh tells the logits apart."""
    generator = torch.Generator().manual_seed(11)
    found: dict[str, Tensor] = {}
    for layer in range(layers):
        found[f"layers.{layer}.router.weight"] = torch.randn(1, channels, generator=generator, dtype=torch.float64) / 40
        found[f"layers.{layer}.router.bias"] = torch.randn(1, generator=generator, dtype=torch.float64) / 4
    return found


def counts(tokens: int) -> dict[int, int]:
    """Of five layers, those that do not run on more than 0.85 of the image, and how many of its tokens they run on."""
    cosines = [math.cos(math.pi * layer / 4) / 2 + 0.5 for layer in range(5)]  # 1, 0.854, 0.5, 0.146, 0
    return {layer: int(max(cosine, 0.15) * tokens) for layer, cosine in enumerate(cosines) if cosine <= 0.85}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DECODERS, *VLMS])
def test_tokens_that_go_around_a_layer_are_hidden_in_it_and_back_behind_it(name: str) -> None:
    inputs = prompts(model=name)
    plain, image = reference(name), visual(name, inputs)
    expected = counts(int(image[0].sum()))
    assert list(expected) == [2, 3, 4]
    with torch.no_grad(), oracle.mixture_of_depths(plain, image, expected, routers(), 0.2) as through:
        wanted = plain(**inputs, use_cache=False, output_hidden_states=True)
    model = tokred.compile(build(name), MixtureOfDepths(routers=routers()), strict=True, **options(name))
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    caches = output.past_key_values.layers
    assert [layer.rows.tolist() for layer in caches if isinstance(layer, PrunedLayer)] == list(through.values())
    assert [layer.keys.shape[2] for layer in caches] == [LENGTH, LENGTH, *(len(rows[0]) for rows in through.values())]
    real = inputs["attention_mask"].bool()
    assert len(output.hidden_states) == len(wanted.hidden_states)
    for got, whole in [(output.logits, wanted.logits), *zip(output.hidden_states, wanted.hidden_states, strict=True)]:
        assert got.shape == whole.shape
        assert (got[real] - whole[real]).abs().max() < 1e-9 * whole[real].abs().max()
    tokens = [b.tokens for g in tokred.reports().graphs for b in g.blocks if b.method and not b.refusal]
    assert tokens == [(LENGTH, len(rows[0])) for rows in through.values()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_generation_goes_on_behind_routed_layers(name: str) -> None:
    inputs = prompts(4, model=name)
    plain, image = reference(name), visual(name, inputs)
    tokens = int(image[0].sum())
    with oracle.mixture_of_depths(plain, image, counts(tokens), routers(), 0.2):
        wanted = _generate(plain, inputs, 12)
    model = tokred.compile(build(name), MixtureOfDepths(routers=routers()), **options(name))
    given = {key: value for key, value in inputs.items() if key != "position_ids"}
    new = model.generate(**given, do_sample=False, max_new_tokens=12, suppress_tokens=[IMAGE])[:, LENGTH:]
    assert new.tolist() == wanted.tolist()
    assert len({tuple(row) for row in wanted.tolist()}) == 4, "the reference says the same to every prompt"
    assert len(tokred.reports().graphs) <= 4, "a graph for each step"


def _generate(model: Any, inputs: dict[str, Tensor], steps: int) -> Tensor:
    return oracle.generate(model, inputs, {}, steps)


@pytest.mark.slow
def test_what_was_dropped_before_stays_away_and_is_not_routed() -> None:
    inputs = prompts(model="llava")
    plain, image = reference("llava"), visual("llava", inputs)
    dropped = oracle.fastv(1, 0.5)(plain, inputs, image)
    left, shares = image & ~dropped[1], {2: 0.5, 4: 0.15}
    expected = {layer: int(share * 8) for layer, share in shares.items()}
    with torch.no_grad(), oracle.masked(dropped), oracle.mixture_of_depths(plain, left, expected, routers(), 0.2):
        wanted = plain(**inputs, use_cache=False).logits
    recipe = [parse_recipe("fastv(layer=1, keep=0.5)"), MixtureOfDepths(routers=routers(), layers=[2, 4])]
    with torch.no_grad():
        output = tokred.compile(build("llava"), recipe, lower="eager", strict=True)(**inputs)
    real = inputs["attention_mask"].bool() & ~dropped[1]
    assert (output.logits[real] - wanted[real]).abs().max() < 1e-9 * wanted.abs().max()


@pytest.mark.slow
def test_inductor_routes_as_the_rewritten_graph_does() -> None:
    inputs = prompts(2, model="llava")
    inputs["pixel_values"] = inputs["pixel_values"].float()
    weights = {name: tensor.float() for name, tensor in routers().items()}
    given = {lower: {"recipe": MixtureOfDepths(routers=weights), "lower": lower} for lower in ("inductor", "eager")}
    switch = Switch({way: parse_options(each, companion=True) for way, each in given.items()})
    model, logits = with_pruned_caches(build("llava", torch.float32), partial(torch.compile, backend=switch)), []
    for switch.way in given:
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-4 * logits[1].abs().max()


def test_the_schedule_is_the_paper_s() -> None:
    method = MixtureOfDepths(routers=routers())
    assert method.default_layers(32) == list(range(8, 32))
    places = [Place(layer=layer, depth=32, tokens=640, span=576, whole=576) for layer in range(32)]
    left = [method.left(place) if place.layer >= 8 else 576 for place in places]
    assert left[-8:] == [86] * 8 and left[23] > 86  # trunc(0.15 * 576)
    assert sum(left) / (32 * 576) == pytest.approx(0.5375, abs=1e-3)  # the paper keeps 53.8 % in its caches
    assert [int((math.cos(math.pi * 16 / 31) / 2 + 0.5) * 576)] == [left[16]]


def test_routers_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    save_file({f"model.{name}": tensor for name, tensor in routers().items()} | {"head": torch.ones(3)}, path)
    (method,) = parse_recipe(f"mixture_of_depths(routers={str(path)!r}, layers=[3])").methods
    x = torch.randn(2, 7, 64, dtype=torch.float64)
    named = routers()
    wanted = x @ named["layers.3.router.weight"][0] + named["layers.3.router.bias"]
    assert isinstance(method, MixtureOfDepths)
    torch.testing.assert_close(method.routers.logits(3, x), wanted, rtol=1e-12, atol=1e-12)
    assert str(method) == f"mixture_of_depths(layers=[3], routers={str(path)!r}, floor=0.15, ceiling=0.85, gain=0.2)"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "a safetensors file or a dict"),
        ({}, "no router in it"),
        ({"layers.1.mlp.weight": torch.ones(4)}, "no router in it"),
        ({"layers.1.router.bias": torch.ones(1)}, "no router in it"),
        ({"layers.1.router.weight": torch.ones(2, 4)}, r"layers.1.router.weight of shape \[2, 4\]"),
        ({"layers.1.router.weight": torch.ones(1, 1, 4)}, r"layers.1.router.weight of shape \[1, 1, 4\]"),
        ({"layers.1.router.weight": torch.ones(4), "layers.1.router.bias": torch.ones(2)}, "2 numbers, not one"),
        ({"layers.1.a_router.weight": torch.ones(4), "layers.1.router.weight": torch.ones(4)}, "only weight"),
        ("nowhere.safetensors", "nowhere.safetensors"),
    ],
)
def test_what_holds_no_routers_is_an_error(given: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        MixtureOfDepths(routers=given)


@pytest.mark.parametrize("value", [1.5, -0.1, True, "0.5"])
@pytest.mark.parametrize("argument", ["keep", "floor", "ceiling", "gain"])
def test_arguments_out_of_range_are_errors(argument: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{argument}="):
        MixtureOfDepths(routers=routers(), **{argument: value})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (routers(3), r"layer 3 has no router; there are some for layers \[0, 1, 2\]"),
        (routers(5, channels=32), "layer 2's router is for 32 channels, not 64"),
    ],
)
def test_a_router_that_is_missing_or_of_another_size_is_named(given: dict[str, Tensor], reason: str) -> None:
    inputs = prompts(model="llama")
    model = tokred.compile(build("llama"), MixtureOfDepths(routers=given), strict=True, **options("llama"))
    with pytest.raises(BackendCompilerFailed, match=reason) as raised, torch.no_grad():
        model(**inputs)
    assert isinstance(raised.value.inner_exception, StrictError)
