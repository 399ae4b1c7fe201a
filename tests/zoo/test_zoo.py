"""Real architectures: blocks found, exact passes exact, nothing removed means nothing changed, reductions run.

The fast tests take one architecture of each kind; the slow ones take all.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
import torch

import tokred
from tests.zoo.architecture import Architecture
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.measure import Row, compiled, difference, outputs_of, summary
from tests.zoo.table import PAGE, load_table, render

TABLE = load_table()

# One of each construct; the others repeat one of these with another name or size.
FAST = {
    "vit",
    "deit_distilled",
    "beit",
    "clip",
    "siglip",
    "siglip2_vision",
    "dinov2_registers",
    "dinov3",
    "vitmae_pretraining",
    "yolos",
    "timm_vit_reg4_gap",
    "timm_vit_parallel",
    "timm_eva02",
    "timm_cait",
    "timm_xcit",
    "timm_mvitv2",
    "timm_swin",
    "timm_naflex",
    "timm_resnet",
    "dpt",
    "segformer",
    "sam_vision",
    "bert_padded",
    "bert_eager",
    "deberta_v2",
    "modernbert",
    "t5_encoder",
    "minilm",
    "whisper_encoder",
    "wav2vec2",
    "dit",
    "sd_unet",
    "flux",
    "nn_encoder_fast_padded",
    "nn_encoder_train",
    "nn_mha_sequence_first",
    "nn_einsum",
    "gpt2",
    "llama_padded",
    "gemma2",
}
assert set(ARCHITECTURES) >= FAST, FAST - set(ARCHITECTURES)

# Nothing removed, in the spelling that each method takes.
NOTHING = (("r", 0), ("ratio", 0.0), ("keep", 1.0))


def _every(names: Any = ARCHITECTURES) -> list[Any]:
    return [pytest.param(ARCHITECTURES[n], id=n, marks=pytest.mark.slow) for n in names]


def _nothing(method: str) -> str:
    """The method's call that removes no token."""
    options = {field.name for field in fields(tokred.methods()[method])}
    name, value = next((name, value) for name, value in NOTHING if name in options)
    return f"{method}({name}={value})"


def _explained(architecture: Architecture, recipe: str) -> Row:
    torch._dynamo.reset()
    with torch.no_grad():
        report = tokred.explain(architecture.model(), **architecture.example(), recipe=recipe)
    return summary(architecture, report, Row(recipe))


def test_the_table_has_a_row_for_every_architecture_and_the_page_shows_it() -> None:
    assert list(TABLE) == list(ARCHITECTURES)
    assert PAGE.read_text() == render(TABLE)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_row_of_the_table_is_wrong(name: str) -> None:
    row = TABLE[name]
    assert row["lossy"] == "ok"
    assert row["exact"] in ("bitwise", "1e-12", "1e-10", "1e-05")
    assert row["exact"] != "1e-05" or not ARCHITECTURES[name].float64


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_attention_block_is_found_or_refused(name: str) -> None:
    found, of = TABLE[name]["attention"]
    assert (found, of) == (ARCHITECTURES[name].attention,) * 2


def test_most_architectures_reduce_tokens() -> None:
    assert sum(bool(row["reduced"]) and row["lossy"] == "ok" for row in TABLE.values()) >= 35


@pytest.mark.parametrize("architecture", _every())
def test_the_report_agrees_with_the_table(architecture: Architecture) -> None:
    expected = TABLE[architecture.name]
    row = json.loads(json.dumps(_explained(architecture, expected["recipe"]).to_json()))  # tuples as the table has them
    for column in ("graphs", "attention", "mlp", "forms", "refusals", "restored"):
        assert row[column] == expected[column], column
    assert [list(tokens) for tokens in row["reduced"]] == expected["reduced"]


@pytest.mark.parametrize("architecture", _every())
def test_exact_passes_are_exact(architecture: Architecture) -> None:
    dtype, bound = (torch.float64, 1e-10) if architecture.float64 else (torch.float32, 1e-5)
    model, inputs = architecture.model(dtype), architecture.example(batch=3, dtype=dtype)
    assert difference(outputs_of(compiled(model, lower="eager"), inputs), outputs_of(model, inputs)) <= bound


@pytest.mark.parametrize("architecture", _every())
def test_nothing_removed_is_nothing_changed(architecture: Architecture) -> None:
    """All methods in one recipe: each is asked at every site."""
    recipe = " + ".join(_nothing(method) for method in tokred.methods())
    assert _differs_bitwise(architecture, recipe) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", tokred.methods())
@pytest.mark.parametrize("architecture", [pytest.param(row, id=name) for name, row in ARCHITECTURES.items()])
def test_each_method_that_removes_nothing_changes_nothing(architecture: Architecture, method: str) -> None:
    recipe = _nothing(method)
    assert _differs_bitwise(architecture, recipe) == []
    model, inputs = architecture.model(), architecture.example()
    actual = outputs_of(compiled(model, recipe=recipe, lower="aot_eager"), inputs)
    assert difference(actual, outputs_of(model, inputs)) <= 1e-5


def _differs_bitwise(architecture: Architecture, recipe: str) -> list[int]:
    """Which outputs differ from the unmodified model's, which Dynamo runs as it stands."""
    model, inputs = architecture.model(), architecture.example()
    actual = outputs_of(compiled(model, recipe=recipe, exact=False, lower="eager"), inputs)
    torch._dynamo.reset()
    expected = outputs_of(torch.compile(model, backend="eager"), inputs)
    assert len(actual) == len(expected)
    return [i for i, (a, e) in enumerate(zip(actual, expected, strict=True)) if not torch.equal(a, e)]


@pytest.mark.parametrize("architecture", _every(name for name, row in TABLE.items() if row["reduced"]))
def test_a_reduction_runs_and_changes_the_result(architecture: Architecture) -> None:
    recipe = TABLE[architecture.name]["recipe"]
    model, inputs = architecture.model(), architecture.example(batch=3)
    expected = outputs_of(model, inputs)
    actual = outputs_of(compiled(model, recipe=recipe, exact=False, lower="eager"), inputs)
    assert [(a.shape, a.dtype) for a in actual] == [(e.shape, e.dtype) for e in expected]
    assert all(bool(a.isfinite().all()) for a in actual)
    assert 0 < difference(actual, expected) < float("inf")
