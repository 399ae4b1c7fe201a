"""Dropping tokens in prefill equals masking their keys: selections, logits, caches, generation."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.decoders import diverse, oracle
from tests.decoders.models import DECODERS, IMAGE, LENGTH, SPAN, VLMS, build, prompts
from tests.one_capture import Switch
from tokred.compiler.options import parse_options
from tokred.generation import PrunedLayer, with_pruned_caches

METHODS: dict[str, oracle.Selection] = {
    "fastv(layer=2, keep=0.5)": oracle.fastv(2, 0.5),
    "pyramiddrop()": oracle.pyramiddrop([1, 2, 3], 0.5),
    "adaptinfer(keep=[0.5, 0.25], layers=[1, 3])": oracle.adaptinfer([1, 3], [0.5, 0.25]),
    "sparsevlm(keep=[0.5, 0.25], layers=[1, 3])": oracle.sparsevlm([1, 3], [0.5, 0.25]),
    "hidrop(keep=[0.5, 0.25, 0], layers=[1, 2, 4])": oracle.hidrop([1, 2, 4], [0.5, 0.25, 0]),
    "todre(keep=0.4)": diverse.todre(0.4, exit_layer=4),
    "todre(keep=0.4, pivot='mean')": diverse.todre(0.4, exit_layer=4, pivot="mean"),
    "zoo_prune(keep=0.4)": diverse.zoo_prune(0.4),
    "zoo_prune(keep=0.4, probes=9, step=0.1, seed=3)": diverse.zoo_prune(0.4, 9, 0.1, 3),
    "zoo_prune(keep=0.4, probes=0)": diverse.zoo_prune(0.4, 0),
    "catp(keep=0.4)": diverse.catp(0.4, 0.7),
    "catp(keep=0.34, images=2)": diverse.catp(0.34, 0.7, 2, 1),
    "corematching(layer=2, keep=0.4)": oracle.corematching(2, 0.4, 0.4),
}


LATE = "hidrop(keep=[0, 1, 0.5, 0], layers=[0, 2, 3, 4])"


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    yield
    torch.compiler.reset()


def options(name: str) -> dict[str, Any]:
    return {"lower": "eager"} | ({} if name in VLMS else {"spans": {"visual": SPAN}})


def reference(name: str, layers: int = 5) -> Any:
    model = build(name, layers=layers)
    model.set_attn_implementation({"text_config": "oracle"} if name in VLMS else "oracle")
    return model


def visual(name: str, inputs: dict[str, Tensor]) -> Tensor:
    """[B N] where the image is."""
    places = torch.arange(LENGTH).expand_as(inputs["input_ids"])
    return inputs["input_ids"] == IMAGE if name in VLMS else (places >= SPAN[0]) & (places < SPAN[1])


def survivors(dropped: oracle.Dropped, batch: int) -> list[list[list[int]]]:
    """The rows that are left after each cut."""
    left, found = torch.ones(batch, LENGTH, dtype=torch.bool), []
    for _, gone in sorted(dropped.items()):
        left = left & ~gone
        found.append([row.nonzero().squeeze(-1).tolist() for row in left])
    return found


def recipes(name: str) -> list[str]:
    """Those to try on a model: what else is made of an encoder, as ZOO-Prune's probes, on some of the VLMs."""
    everywhere = [each for each in METHODS if "pivot" not in each and ("zoo" not in each or "probes=0" in each)]
    return list(METHODS) if name.startswith("llava") else everywhere


class Prefill:
    """A model under every recipe."""

    def __init__(self, name: str):
        self.name, self.plain, self.inputs = name, reference(name), prompts(model=name)
        self.visual = visual(name, self.inputs)
        ways = {recipe: options(name) | {"recipe": recipe} for recipe in (*recipes(name), LATE)}
        self.switch = Switch({recipe: parse_options(given, None, companion=True) for recipe, given in ways.items()})
        self.model = with_pruned_caches(build(name), partial(torch.compile, backend=self.switch))

    def run(self, recipe: str) -> Any:
        self.switch.way = recipe
        with torch.no_grad():
            return self.model(**self.inputs)

    def wanted(self, dropped: oracle.Dropped) -> Tensor:
        with torch.no_grad(), oracle.masked(dropped):
            logits: Tensor = self.plain(**self.inputs, use_cache=False).logits
        return logits

    def agree(self, got: Tensor, wanted: Tensor, rows: list[list[int]]) -> None:
        for sample, survivor in enumerate(rows):
            real = [row for row in survivor if self.inputs["attention_mask"][sample, row]]
            difference = (got[sample, real] - wanted[sample, real]).abs().max()
            assert difference < 1e-9 * wanted.abs().max(), f"{self.name}, {self.switch.way}: off by {difference}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DECODERS, *VLMS])
def test_a_reduced_prefill_is_the_full_one_with_the_dropped_keys_masked(name: str, subtests: pytest.Subtests) -> None:
    prefill = Prefill(name)
    for recipe in recipes(name):
        with subtests.test(recipe):
            dropped = METHODS[recipe](prefill.plain, prefill.inputs, prefill.visual)
            wanted, output = prefill.wanted(dropped), prefill.run(recipe)
            left = survivors(dropped, 3)
            pruned = [layer for layer in output.past_key_values.layers if isinstance(layer, PrunedLayer)]
            caches = [layer.rows.tolist() for layer in pruned]
            assert [rows for i, rows in enumerate(caches) if rows not in caches[:i]] == left, "selected otherwise"
            assert all(x.shape[2] == layer.rows.shape[1] for layer in pruned for x in (layer.keys, layer.values))
            prefill.agree(output.logits, wanted, left[-1])
    with subtests.test(LATE):
        late_tokens_are_not_seen_and_do_not_change_before_they_enter(prefill)


def late_tokens_are_not_seen_and_do_not_change_before_they_enter(prefill: Prefill) -> None:
    with oracle.late(prefill.plain, prefill.visual, 2):
        dropped = oracle.hidrop([3, 4], [0.5, 0.0])(prefill.plain, prefill.inputs, prefill.visual)
        wanted = prefill.wanted(dropped)
    output = prefill.run(LATE)
    text, half = survivors({0: prefill.visual}, 3)[0], survivors({3: dropped[3]}, 3)[0]
    found = [layer.rows.tolist() if isinstance(layer, PrunedLayer) else None for layer in output.past_key_values.layers]
    assert found == [text, text, None, half, text]
    prefill.agree(output.logits, wanted, text)
    shown = [block.tokens for block in prefill.switch.reports[LATE].blocks if block.method and not block.refusal]
    assert shown == [
        (LENGTH, len(text[0])),
        (len(text[0]), LENGTH),
        (LENGTH, len(half[0])),
        (len(half[0]), len(text[0])),
    ]


@pytest.mark.slow
def test_generation_goes_on_behind_late_injection() -> None:
    inputs = prompts(4, model="llava")
    plain, image = reference("llava"), visual("llava", inputs)
    with oracle.late(plain, image, 1):
        wanted = oracle.generate(plain, inputs, oracle.hidrop([2, 3], [0.5, 0.0])(plain, inputs, image), 12)
    # Not at layer 4: generate() asks for the last logits, for which the last layer has one query and is no site.
    model = tokred.compile(build("llava"), "hidrop(keep=[0, 1, 0.5, 0], layers=[0, 1, 2, 3])", **options("llava"))
    given = {key: value for key, value in inputs.items() if key != "position_ids"}
    new = model.generate(**given, do_sample=False, max_new_tokens=12, suppress_tokens=[IMAGE])[:, LENGTH:]
    assert new.tolist() == wanted.tolist()
    assert len({tuple(row) for row in wanted.tolist()}) == 4, "the reference says the same to every prompt"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe"),
    [(name, "fastv(layer=1, keep=0.5)") for name in ("llama", "qwen3", "gemma3", "llava", "internvl")]
    + [(name, "todre(keep=0.4)") for name in ("llama", "llava")],  # every cache is cut
)
def test_generation_goes_on_behind_a_pruned_prefill(name: str, recipe: str) -> None:
    inputs = prompts(4, model=name)
    plain = reference(name, layers=3)
    select = oracle.fastv(1, 0.5) if "fastv" in recipe else diverse.todre(0.4, exit_layer=2)
    dropped = select(plain, inputs, visual(name, inputs))
    wanted = oracle.generate(plain, inputs, dropped, 32)
    tokred.reset()
    model = tokred.compile(build(name, layers=3), recipe, **options(name))
    given = {key: value for key, value in inputs.items() if key != "position_ids"}
    new = model.generate(**given, do_sample=False, max_new_tokens=32, suppress_tokens=[IMAGE])[:, LENGTH:]
    assert new.tolist() == wanted.tolist()
    assert len({tuple(row) for row in wanted.tolist()}) == 4, "the reference says the same to every prompt"
    assert len(tokred.reports().graphs) <= 4, "a graph for each step"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fastv(layer=1, keep=0.5)", "hidrop()", "aim()"])
def test_inductor_generates_what_the_rewritten_graph_does(recipe: str) -> None:
    inputs = prompts(2, model="llava")
    inputs["pixel_values"] = inputs["pixel_values"].float()
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    step = {"input_ids": torch.full((2, 1), 7), "attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
    ways = {lower: parse_options({"recipe": recipe, "lower": lower}, companion=True) for lower in ("inductor", "eager")}
    switch, logits = Switch(ways, graphs=2), []
    model = with_pruned_caches(build("llava", torch.float32, layers=3), partial(torch.compile, backend=switch))
    for switch.way in ways:
        with torch.no_grad():
            cache = model(**inputs).past_key_values
            logits.append(model(**step, past_key_values=cache).logits)
    assert any(isinstance(layer, PrunedLayer) for layer in cache.layers)
    assert (logits[0] - logits[1]).abs().max() < 1e-4 * logits[1].abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_a_cut_in_front_of_the_last_layer_is_made_if_only_the_last_logits_are_read(whole: bool) -> None:
    inputs = prompts(model="llama")
    plain = reference("llama")
    dropped = oracle.fastv(4, 0.5)(plain, inputs, visual("llama", inputs))
    with torch.no_grad(), oracle.masked(dropped):
        wanted = plain(**inputs, use_cache=False).logits[:, -1:]
    model = tokred.compile(build("llama"), "fastv(layer=4, keep=0.5)", **options("llama"))
    with torch.no_grad():
        output = model(**inputs, logits_to_keep=0 if whole else 1)
    assert output.past_key_values.layers[-1].rows.tolist() == survivors(dropped, 3)[0]
    assert (output.logits[:, -1:] - wanted).abs().max() < 1e-9 * wanted.abs().max()
