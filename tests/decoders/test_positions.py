"""Compact positions: tokens that are left are numbered 0, 1, 2, ... behind a cut, in prefill and while generating."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import tokred
from tests.decoders import diverse, oracle
from tests.decoders.models import LENGTH, SIZES, SPAN, build, prompts
from tokred.errors import OptionError

METHODS: dict[str, oracle.Selection] = {
    "fastv(layer=1, keep=0.5)": oracle.fastv(1, 0.5),
    "pyramiddrop(layers=[1, 2])": oracle.pyramiddrop([1, 2], 0.5),
    "todre(keep=0.4)": diverse.todre(0.4, exit_layer=2),
}
CASES = [("llama", "fastv(layer=1, keep=0.5)"), ("llama", "todre(keep=0.4)"), ("qwen3", "pyramiddrop(layers=[1, 2])")]
THREE = SIZES | {"num_hidden_layers": 3}
COMPACT: dict[str, Any] = {"lower": "eager", "positions": "compact", "spans": {"visual": SPAN}}


pytestmark = pytest.mark.usefixtures("fresh")


class Turns(torch.nn.Module):
    """Rotary tables in the precision of the tokens; transformers rounds angles to float32."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        rate = 1e4 ** -(torch.arange(0, 16, 2, dtype=x.dtype) / 16)
        angle = position_ids.unsqueeze(-1).to(x.dtype) * torch.cat([rate, rate])
        return angle.cos(), angle.sin()


def exact(name: str) -> Any:
    model = build(name, layers=3)
    model.model.rotary_emb = Turns()
    return model


def reference(model: Any, inputs: dict[str, Tensor], recipe: str) -> tuple[Any, oracle.Dropped]:
    """The model with attention written out, and what the method drops in it if positions are compact."""
    model.set_attn_implementation("oracle")
    places = torch.arange(LENGTH).expand_as(inputs["input_ids"])
    with oracle.compact(model):
        return model, METHODS[recipe](model, inputs, (places >= SPAN[0]) & (places < SPAN[1]))


def padded() -> dict[str, Tensor]:
    """Prompts of which the last has padding up to the image: some of it is among the rows that get new numbers."""
    inputs = prompts()
    mask = inputs["attention_mask"]
    mask[2, : SPAN[0]] = 0
    return inputs | {"input_ids": inputs["input_ids"] * mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def refusals() -> list[str]:
    return [b.refusal.code for graph in tokred.reports().graphs for b in graph.blocks if b.method and b.refusal]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_a_prefill_numbers_the_kept_tokens_anew(name: str, recipe: str) -> None:
    inputs = padded()
    plain, dropped = reference(exact(name), inputs, recipe)
    with torch.no_grad(), oracle.masked(dropped):
        persistent = plain(**inputs, use_cache=False).logits
        with oracle.compact(plain):
            wanted = plain(**inputs, use_cache=False).logits
        got = tokred.compile(exact(name), recipe, strict=True, **COMPACT)(**inputs).logits
    gone = torch.stack(list(dropped.values())).any(0)
    real = inputs["attention_mask"].bool() & ~gone
    scale = wanted.abs().max()
    assert (got - wanted)[real].abs().max() < 1e-9 * scale
    assert (persistent - wanted)[real].abs().max() > 1e-4 * scale, "the numbers make no difference"
    notes = [b.note for graph in tokred.reports().graphs for b in graph.blocks if b.method]
    assert all("compact positions" in note for note in notes)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_generation_goes_on_behind_the_new_numbers(name: str, recipe: str) -> None:
    inputs = prompts()
    plain, dropped = reference(build(name, layers=3), inputs, recipe)
    persistent = oracle.generate(plain, inputs, dropped, 8)
    with oracle.compact(plain):
        wanted = oracle.generate(plain, inputs, dropped, 8)
    model = tokred.compile(build(name, layers=3), recipe, **COMPACT)
    given = {key: value for key, value in inputs.items() if key != "position_ids"}
    new = model.generate(**given, do_sample=False, max_new_tokens=8, suppress_tokens=[98])[:, LENGTH:]
    assert new.tolist() == wanted.tolist()
    assert wanted.tolist() != persistent.tolist(), "the numbers make no difference"


@pytest.mark.slow
def test_a_new_prompt_length_is_numbered_as_it_would_be_alone() -> None:
    model, results = build("llama", layers=3), []
    fast = tokred.compile(model, "fastv(layer=1, keep=0.5)", **COMPACT)
    for length in (LENGTH, LENGTH + 7, LENGTH + 16):
        ids = torch.randint(3, 98, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            results.append((ids, fast(input_ids=ids).logits))
    acted = [block for graph in tokred.reports().graphs for block in graph.blocks if block.method]
    assert len(acted) == 2 and not any(block.refusal for block in acted)
    ids, logits = results[-1]
    torch.compiler.reset()
    with torch.no_grad():
        alone = tokred.compile(model, "fastv(layer=1, keep=0.5)", dynamic=False, **COMPACT)(input_ids=ids).logits
    torch.testing.assert_close(logits, alone, rtol=1e-9, atol=1e-9)


def test_positions_that_were_added_to_the_tokens_are_refused() -> None:
    model, inputs = build("gpt2", layers=3), prompts()
    with torch.no_grad():
        logits = tokred.compile(model, "fastv()", **COMPACT)(**inputs).logits
        torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-9, atol=1e-9)
    assert refusals() == ["compact-positions"]


def test_three_positions_for_each_token_are_refused() -> None:
    text = THREE | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    torch.manual_seed(0)
    model = hf.Qwen2VLTextModel(hf.Qwen2VLTextConfig(**text)).double().eval()
    inputs = {"inputs_embeds": torch.randn(2, LENGTH, 64, dtype=torch.float64), "use_cache": False}
    places = torch.stack([torch.arange(LENGTH), torch.arange(LENGTH) // 2, torch.arange(LENGTH) // 3])
    inputs["position_ids"] = places.unsqueeze(1).expand(-1, 2, -1)
    compiled = tokred.compile(model, "fastv()", **COMPACT)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-9, atol=1e-9)
    assert refusals() == ["compact-positions"]


def test_a_window_is_refused() -> None:
    torch.manual_seed(0)
    model = hf.MistralForCausalLM(hf.MistralConfig(**THREE, sliding_window=8)).double().eval()
    inputs = prompts() | {"use_cache": False}
    compiled = tokred.compile(model, "fastv()", **COMPACT)
    with torch.no_grad():
        compiled(**inputs)
    assert refusals() == ["compact-positions"]


@pytest.mark.slow
def test_positions_with_gaps_are_an_error() -> None:
    inputs = prompts()
    inputs["position_ids"] = 2 * inputs["position_ids"]
    with torch.no_grad(), pytest.raises(RuntimeError, match="whose positions are not 0, 1, 2"):
        tokred.compile(build("llama", layers=3), "fastv()", **COMPACT)(**inputs)


def test_a_misspelt_policy_is_an_error() -> None:
    with pytest.raises(OptionError, match="Did you mean 'compact'"):
        tokred.compile(build("llama"), "fastv()", positions="compct")
