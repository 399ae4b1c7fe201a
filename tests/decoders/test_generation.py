"""generate() of a vision-language model: images are encoded in the prefill's own graph, where that can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import tokred
from tests.decoders import oracle
from tests.decoders.models import GEMMA, IMAGE, LENGTH, SPAN, build, prompts
from tests.decoders.test_catp import two_images
from tokred.generation import PrunedLayer


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    tokred.reset()
    yield
    torch.compiler.reset()


def generated(model: Any, inputs: dict[str, Any], steps: int, **options: Any) -> list[list[int]]:
    given = {key: value for key, value in inputs.items() if key != "position_ids"}
    rows = model.generate(**given, do_sample=False, max_new_tokens=steps, suppress_tokens=[IMAGE], **options)
    found: list[list[int]] = rows[:, inputs["input_ids"].shape[1] :].tolist()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["visionzip(keep=0.5)", "correlation(keep=0.5)", "zoo_prune(keep=0.5, probes=2)"])
def test_a_method_that_looks_at_the_encoder_acts_in_generate(recipe: str) -> None:
    inputs = prompts(3, model="llava")
    model = tokred.compile(build("llava"), recipe, lower="eager")
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    logits[:, IMAGE] = -torch.inf
    tokred.reset()
    assert generated(model, inputs, 1) == logits.argmax(-1, keepdim=True).tolist()
    (prefill,) = tokred.reports().graphs
    (cut,) = [block for block in prefill.blocks if block.method]
    assert cut.refusal is None and cut.tokens[0] == LENGTH > cut.tokens[1]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
def test_repeated_samples_keep_their_own_images(options: dict[str, int]) -> None:
    inputs = two_images(2)  # two images a sample, so that repeating images one by one would mix them up
    model = build("llava")
    assert generated(tokred.compile(model, lower="eager"), inputs, 6, **options) == generated(
        model, inputs, 6, **options
    )


@pytest.mark.slow
def test_a_forward_that_returns_a_tuple_prunes_its_caches_as_well() -> None:
    inputs = prompts(2, model="llava")
    model = tokred.compile(build("llava"), "fastv(layer=2, keep=0.5)", lower="eager")
    with torch.no_grad():
        (cache,) = [part for part in model(**inputs, return_dict=False) if isinstance(part, hf.DynamicCache)]
    assert [isinstance(layer, PrunedLayer) for layer in cache.layers] == [False, False, True, True, True]
