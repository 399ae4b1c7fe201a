"""Real architectures: blocks found, exact passes exact, nothing removed means nothing changed, reductions run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import tokred
from tests.one_capture import compile_in_ways
from tests.zoo.architecture import Architecture, tensors_of
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.measure import Row, difference, outputs_of, summary
from tests.zoo.table import PAGE, load_table, render
from tokred.compiler.options import parse_options
from tokred.compiler.report import GraphReport, Report

TABLE = load_table()

# Nothing removed, in the spelling that each method takes.
NOTHING = (("r", 0), ("ratio", 0.0), ("keep", 1.0), ("coverage", 0.0), ("sparsity", 0.0), ("keyframe", 1))


def _nothing(method: str) -> str:
    """The method's call that removes no token."""
    options = {field.name for field in fields(tokred.methods()[method])}
    name, value = next((name, value) for name, value in NOTHING if name in options)
    return f"{method}({name}={value})"


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
    reduced = [row["lower"] for row in TABLE.values() if row["reduced"] and row["lossy"] == "ok"]
    assert reduced.count("inductor") >= 35


class Side:
    """A backend that compiles each graph in several ways, runs them all on the same inputs, and goes on unmodified.

    One run of Dynamo and one capture serve them all; `results` holds, for each way, the tensors of every graph in turn.
    """

    def __init__(self, **ways: dict[str, Any]):
        self.ways = {name: parse_options({"lower": "eager", **options}, None) for name, options in ways.items()}
        self.results: dict[str, list[Tensor]] = {name: [] for name in ("unmodified", *ways)}
        self.reports: dict[str, list[GraphReport]] = {name: [] for name in ways}

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        functions, reports = compile_in_ways(gm, inputs, self.ways)
        for name, report in reports.items():
            self.reports[name].append(report)

        def run(*args: Any) -> Any:
            before = [arg.clone() if isinstance(arg, Tensor) else None for arg in args]
            for name, function in {**functions, "unmodified": gm}.items():
                for arg, value in zip(args, before, strict=True):  # the last one may have written to its inputs
                    if value is not None and not torch.equal(arg, value):
                        arg.detach().copy_(value)
                with torch.random.fork_rng():
                    result = function(*args)
                self.results[name] += [tensor.detach().clone() for tensor in tensors_of(result)]
            return result

        return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", [pytest.param(row, id=name) for name, row in ARCHITECTURES.items() if "vlm" not in row.tags]
)
def test_a_model_is_found_exact_and_reduced(architecture: Architecture) -> None:
    """In float64 where the model has it: the report of the table's recipe, what it does, and what nothing does.

    "Nothing" is a recipe of every method, removing no tokens: each is asked at every site, and changes no bit. The
    exact passes, without a recipe, are as exact as they are meant to be.
    """
    expected = TABLE[architecture.name]
    # two cannot do without imported weights, and one has no amount that could be zero
    left = ("mixture_of_depths", "adaptive_width", "lora_prune", "skip_block")
    own = [method for method in tokred.methods() if method not in left]
    nothing = " + ".join(map(_nothing, own))
    side = Side(
        recipe={"recipe": expected["recipe"]},
        nothing={"recipe": nothing, "exact": False},
        exact={},
    )
    dtype, bound = (torch.float64, 1e-10) if architecture.float64 else (torch.float32, 1e-5)
    model, inputs = architecture.model(dtype), architecture.example(dtype=dtype)
    torch._dynamo.reset()
    outputs_of(torch.compile(model, backend=side), inputs)

    row = summary(architecture, Report(side.reports["recipe"]), Row(expected["recipe"])).to_json()
    row = json.loads(json.dumps(row))  # tuples as the table has them
    for column in ("graphs", "attention", "mlp", "forms", "refusals", "restored", "reduced"):
        assert row[column] == expected[column], column

    unmodified, reduced = side.results["unmodified"], side.results["recipe"]
    assert unmodified
    assert len(side.results["nothing"]) == len(unmodified)
    assert all(torch.equal(a, e) for a, e in zip(side.results["nothing"], unmodified, strict=True))
    assert difference(side.results["exact"], unmodified) <= bound
    assert [(a.shape, a.dtype) for a in reduced] == [(e.shape, e.dtype) for e in unmodified]
    assert all(bool(a.isfinite().all()) for a in reduced if a.is_floating_point())
    if expected["reduced"]:
        assert 0 < difference(reduced, unmodified) < float("inf")
    else:
        assert difference(reduced, unmodified) <= bound
