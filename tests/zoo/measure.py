"""Measures one row of the zoo's table: what tokred finds, how exact its exact passes are, and what a recipe does."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from tests.zoo.architecture import Architecture, Inputs, tensors_of
from tokred.compiler.report import BlockReport, GraphReport, Report

__all__ = ["Row", "compiled", "difference", "measure", "outputs_of", "recipe_for", "spans_of", "summary"]


@dataclass
class Row:
    """What the table says about one architecture. Nothing in it depends on the machine."""

    recipe: str
    graphs: int = 0
    attention: tuple[int, int] = (0, 0)  # found, of
    mlp: tuple[int, int] = (0, 0)
    forms: dict[str, int] = field(default_factory=dict)  # "attention self": 3
    reduced: list[tuple[Any, Any]] = field(
        default_factory=list
    )  # tokens before and after, for each site that a method changed
    refusals: dict[str, int] = field(default_factory=dict)  # code: how many sites
    restored: list[str] = field(default_factory=list)
    exact: str = ""  # how far the exact passes are from eager, in float64 where the model has it
    lossy: str = ""  # "ok", or what went wrong with the recipe
    lower: str = ""  # how the recipe was lowered

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def recipe_for(architecture: Architecture) -> str:
    """The recipe a user of such a model would try first."""
    if "diffusion" in architecture.tags:
        return "tomesd(ratio=0.5)"
    if "vlm" in architecture.tags:
        return "fastv(layer=1, keep=0.5)"
    return "tome(r=4)"


def compiled(architecture: Architecture, dtype: torch.dtype, **options: Any) -> Any:
    """The model as a user compiles it; Dynamo starts from nothing, so that one row cannot influence another."""
    torch._dynamo.reset()
    model = architecture.model(dtype)
    if "vlm" in architecture.tags:  # with a cache to return
        return tokred.compile(model, options.pop("recipe", None), **options, **spans_of(architecture))
    return torch.compile(model, backend="tokred", options=options)


def spans_of(architecture: Architecture) -> dict[str, Any]:
    """The option `spans`, for the rows that need it."""
    return {} if architecture.visual is None else {"spans": {"visual": architecture.visual}}


def outputs_of(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(model(**inputs))


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference relative to its tensor's largest value; infinite if the outputs do not compare."""
    if [(a.shape, a.dtype) for a in actual] != [(e.shape, e.dtype) for e in expected]:
        return float("inf")
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if not e.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, e) else float("inf"))
        elif e.numel():
            error = (a - e).abs().max() / e.abs().max().clamp_min(torch.finfo(e.dtype).tiny)
            worst = max(worst, float(error.nan_to_num(nan=float("inf"))))
    return worst


def measure(architecture: Architecture, lower: str, recipe: str | None = None) -> tuple[Row, dict[str, float]]:
    """The row, and the seconds that each of its steps took. A step that fails says so in the row."""
    row = Row(recipe or recipe_for(architecture), lower=lower)
    row.attention, row.mlp = (0, architecture.attention), (0, architecture.mlp)
    seconds = {}
    for step in (_explain, _exact, _lossy):
        start = time.perf_counter()
        step(architecture, row)
        seconds[step.__name__.strip("_")] = round(time.perf_counter() - start, 1)
    return row, seconds


def _explain(architecture: Architecture, row: Row) -> None:
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            options = spans_of(architecture)
            report = tokred.explain(architecture.model(), **architecture.example(), recipe=row.recipe, options=options)
    except Exception as error:  # a row of the table, not a crash of the run
        row.lossy = _failure(error)
        return
    summary(architecture, report, row)


def _exact(architecture: Architecture, row: Row) -> None:
    """Through aot_eager: the figure is what the passes did, without Inductor's own rounding."""
    dtype = torch.float64 if architecture.float64 else torch.float32
    model, inputs = architecture.model(dtype), architecture.example(dtype=dtype)
    try:
        actual = outputs_of(compiled(architecture, dtype, lower="aot_eager"), inputs)
        worst = difference(actual, outputs_of(model, inputs))
    except Exception as error:
        row.exact = _failure(error)
        return
    limits = (0.0, 1e-12, 1e-10) if architecture.float64 else (0.0, 1e-5)
    bound = next((limit for limit in limits if worst <= limit), None)
    row.exact = {None: f"WRONG: {worst:.1e}", 0.0: "bitwise"}.get(bound, f"{bound:g}")


def _lossy(architecture: Architecture, row: Row) -> None:
    if row.lossy:
        return
    model, inputs = architecture.model(), architecture.example()
    expected = outputs_of(model, inputs)
    try:
        actual = outputs_of(compiled(architecture, torch.float32, recipe=row.recipe, lower=row.lower), inputs)
    except Exception as error:
        row.lossy = _failure(error)
        return
    if [a.shape for a in actual] != [e.shape for e in expected]:
        row.lossy = f"WRONG: shapes {[tuple(a.shape) for a in actual]}"
    elif not all(bool(a.isfinite().all()) for a in actual):
        row.lossy = "WRONG: not finite"
    else:
        row.lossy = "ok"


def _failure(error: Exception) -> str:
    return _without_paths(
        f"ERROR: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    )[:200]


def summary(architecture: Architecture, report: Report, row: Row) -> Row:
    """Fill the row's counts from a report."""
    blocks = [block for graph in report.graphs for block in graph.blocks]
    row.graphs = len(report.graphs)
    row.attention = (_count(blocks, "attention"), architecture.attention)
    row.mlp = (_count(blocks, "mlp"), architecture.mlp)
    row.forms = dict(sorted(Counter(f"{block.kind} {block.form}".strip() for block in blocks).items()))
    row.reduced = [block.tokens for block in blocks if block.method is not None and block.tokens[0] != block.tokens[1]]
    row.refusals = dict(sorted(Counter(code for graph in report.graphs for code in _codes(graph)).items()))
    row.restored = sorted({_without_paths(line) for graph in report.graphs for line in graph.restores})
    return row


def _count(blocks: list[BlockReport], kind: str) -> int:
    return sum(block.kind == kind for block in blocks)


def _codes(graph: GraphReport) -> list[str]:
    refusals = [block.refusal for block in graph.blocks] + [
        refusal
        for each in graph.passes
        if each.name != "pack_tokens"
        for refusal in each.refusals  # no site
    ]
    return [refusal.code for refusal in refusals if refusal is not None]


def _without_paths(text: str) -> str:
    """Machine-independent: `/any/where/site-packages/timm/x.py` becomes `timm/x.py`."""
    return re.sub(r"/[^\s\"']*/(?:site-packages|main)/", "", text)
