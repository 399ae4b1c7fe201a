"""Real architectures: blocks found, exact passes exact, nothing removed means nothing changed, reductions run.

The fast tests read the table; the slow ones run the models.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import fx

import tokred
from tests.zoo.architecture import Architecture
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.measure import Row, compiled, difference, outputs_of, summary
from tests.zoo.table import PAGE, load_table, render
from tokred.compiler.axes import Axes
from tokred.compiler.blocks import find_blocks
from tokred.compiler.capture import capture
from tokred.compiler.cost import Gate
from tokred.passes.reduce_tokens import reduce_tokens
from tokred.registry.recipe import parse_recipe

TABLE = load_table()

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
    """All methods in one recipe, each asked at every site: bitwise equal; and each alone leaves the graph as it is."""
    recipe = " + ".join(_nothing(method) for method in tokred.methods())
    assert _differs_bitwise(architecture, recipe) == []
    assert _rewritten_by(architecture, {_nothing(method) for method in tokred.methods()}) == []


def _differs_bitwise(architecture: Architecture, recipe: str) -> list[int]:
    """Which outputs differ from the unmodified model's, which Dynamo runs as it stands."""
    model, inputs = architecture.model(), architecture.example()
    actual = outputs_of(compiled(model, recipe=recipe, exact=False, lower="eager"), inputs)
    torch._dynamo.reset()
    expected = outputs_of(torch.compile(model, backend="eager"), inputs)
    assert len(actual) == len(expected)
    return [i for i, (a, e) in enumerate(zip(actual, expected, strict=True)) if not torch.equal(a, e)]


def _rewritten_by(architecture: Architecture, recipes: set[str]) -> list[str]:
    """The recipes that change any graph of the model, on one capture of each graph."""
    changed: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
        graph = capture(gm, inputs)
        axes = Axes(graph.graph)
        blocks = find_blocks(graph, axes)
        gate = Gate(graph, blocks, axes, refuse=False)
        for recipe in recipes:
            if reduce_tokens(graph, blocks, axes, parse_recipe(recipe), full=True, gate=gate).graph is not graph:
                changed.append(recipe)
        return gm

    torch._dynamo.reset()
    outputs_of(torch.compile(architecture.model(), backend=backend), architecture.example())
    return changed


@pytest.mark.parametrize("architecture", _every(name for name, row in TABLE.items() if row["reduced"]))
def test_a_reduction_runs_and_changes_the_result(architecture: Architecture) -> None:
    recipe = TABLE[architecture.name]["recipe"]
    model, inputs = architecture.model(), architecture.example(batch=3)
    expected = outputs_of(model, inputs)
    actual = outputs_of(compiled(model, recipe=recipe, exact=False, lower="eager"), inputs)
    assert [(a.shape, a.dtype) for a in actual] == [(e.shape, e.dtype) for e in expected]
    assert all(bool(a.isfinite().all()) for a in actual)
    assert 0 < difference(actual, expected) < float("inf")
