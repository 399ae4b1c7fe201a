"""`tokred demo mosaic`: a real vision-language model, every method for image tokens; accuracy, tokens, FLOPs, speed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo

import tokred
from tokred.bench import interleaved
from tokred.demo.mosaic.data import KINDS, PATCHES, Samples, samples
from tokred.demo.mosaic.model import load

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["EXACT", "LEVELS", "RECIPES", "Row", "recipes", "run_demo", "score", "time_against_dense"]

BATCH = 60  # whole batches alone, so that one compilation serves all
WORDS = 4  # generated for the end-to-end time: an answer, and what follows
ROUNDS = 9
LEVELS = (50, 75, 90)  # per cent of the image's tokens removed
EXACT = "exact passes only"
LAYER_0 = 'layers="*language_model.layers.0.*"'  # not the vision tower's
LAYER_1 = 'layers="*language_model.layers.1.*"'

# One recipe for each level, or two. A method with one cut acts between layers 1 and 2 of 8, as FastV proposes, so 100
# tokens in two layers and what is kept in six: 62.5, 43.75 or 32.5 on average. One with several cuts has about the same
# average, so that the methods meet at about equal cost in each row's group, and leaves fewer in the end.
RECIPES: dict[str, tuple[str, ...]] = {
    "random": (
        *(f"random(keep=0.5, {LAYER_1})", f"random(keep=0.25, {LAYER_1})", f"random(keep=0.1, {LAYER_1})"),
        *(f"random(keep=0.5, {LAYER_0})", f"random(keep=0.25, {LAYER_0})", f"random(keep=0.1, {LAYER_0})"),
    ),
    "norm": (f"norm(keep=0.5, {LAYER_1})", f"norm(keep=0.25, {LAYER_1})", f"norm(keep=0.1, {LAYER_1})"),
    "fastv": ("fastv(layer=2, keep=0.5)", "fastv(layer=2, keep=0.25)", "fastv(layer=2, keep=0.1)"),
    "pyramiddrop": ("pyramiddrop(keep=0.691)", "pyramiddrop(keep=0.4525)", "pyramiddrop(keep=0.233)"),
    "adaptinfer": (
        "adaptinfer(keep=[0.8, 0.6, 0.4])",
        "adaptinfer(keep=[0.6, 0.35, 0.2])",
        "adaptinfer(keep=[0.5, 0.2, 0.07])",
    ),
    "sparsevlm": (
        "sparsevlm(keep=[0.75, 0.55, 0.45])",
        "sparsevlm(keep=[0.5, 0.4, 0.2625])",
        "sparsevlm(keep=[0.4, 0.2, 0.2])",
    ),
    "corematching": (
        "corematching(layer=2, keep=0.5)",
        "corematching(layer=2, keep=0.25)",
        "corematching(layer=2, keep=0.1)",
    ),
    "hidrop": (
        "hidrop(keep=[0, 1, 0.75, 0.5, 0], layers=[0, 1, 3, 5, 7])",
        "hidrop(keep=[0, 1, 0.5, 0.25, 0], layers=[0, 1, 3, 5, 7])",
        "hidrop(keep=[0, 1, 0.2, 0.1, 0], layers=[0, 1, 3, 5, 7])",
    ),
    # In front of layer 0, so all layers run on what is kept, which is less on average than above.
    "todre": (
        *("todre(keep=0.5)", "todre(keep=0.25)", "todre(keep=0.1)"),
        *("todre(keep=0.5, exit=None)", "todre(keep=0.25, exit=None)", "todre(keep=0.1, exit=None)"),
    ),
    "zoo_prune": ("zoo_prune(keep=0.5)", "zoo_prune(keep=0.25)", "zoo_prune(keep=0.1)"),
    "catp": ("catp(keep=0.5)", "catp(keep=0.25)", "catp(keep=0.1)"),
    "visionzip": ("visionzip(keep=0.5)", "visionzip(keep=0.25)", "visionzip(keep=0.1)"),
    "aim": (
        "aim(keep=[0.5, 0.8, 0.6, 0.4], layers=[0, 4, 5, 6])",
        "aim(keep=[0.25, 0.8, 0.6, 0.4], layers=[0, 4, 5, 6])",
        "aim(keep=[0.125, 0.8, 0.6, 0.4], layers=[0, 4, 5, 6])",
    ),
    "elastic_pool": ("elastic_pool(tokens=49)", "elastic_pool(tokens=25)", "elastic_pool(tokens=9)"),
    "pool": (f"pool(keep=0.5, {LAYER_1})", f"pool(keep=0.25, {LAYER_1})", f"pool(keep=0.1, {LAYER_1})"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table. `flops` is relative to the model as it is, the speeds to the same under Inductor.

    accuracy   of each kind of question
    visual     how many of the image's tokens each layer of the language model attends to, from its caches
    """

    method: str
    removed: int
    recipe: str
    accuracy: dict[str, float] = field(default_factory=dict)
    visual: list[int] = field(default_factory=list)
    flops: float = 1.0
    prefill: float | None = None
    end_to_end: float | None = None

    @property
    def total(self) -> float:
        return mean(self.accuracy.values())  # as many questions of each kind


def recipes(levels: Sequence[int] = LEVELS) -> list[Row]:
    """What to measure: the model as it is, then level by level the recipes of the methods that are registered."""
    registered = tokred.methods()
    rows = [Row("dense", 0, EXACT)]
    for number, level in enumerate(LEVELS):
        if level in levels:
            found = [(name, each[number :: len(LEVELS)]) for name, each in RECIPES.items() if name in registered]
            rows += [Row(name, level, recipe) for name, each in found for recipe in each]
    return rows


def _compiled(model: Any, row: Row, lower: str) -> Any:
    return tokred.compile(model, None if row.recipe == EXACT else row.recipe, lower=lower)


@torch.no_grad()
def score(model: Any, data: Samples, row: Row) -> Row:
    """`row` with its accuracy, tokens and FLOPs: the rewritten graph, run node by node, so that nothing is generated.

    `data` is a whole number of batches. An answer is right if it is the most likely of all words behind the prompt.
    """
    torch._dynamo.reset()
    seen = len(tokred.reports().graphs)
    function = _compiled(model, row, "eager")
    hits = []
    for start in range(0, len(data), BATCH):
        part = slice(start, start + BATCH)
        output = function(**data.inputs(part), logits_to_keep=1)
        hits.append(output.logits[:, -1].argmax(-1) == data.answer[part])
    text = data.input_ids.shape[1] - PATCHES
    visual = [layer.keys.shape[-2] - text for layer in output.past_key_values.layers]
    graphs = tokred.reports().graphs[seen:]
    before, after = (sum(graph.flops[i] for graph in graphs) for i in (0, 1))
    right = torch.cat(hits).double()
    accuracy = {kind: float(right[data.kind == number].mean()) for number, kind in enumerate(KINDS)}
    return replace(row, accuracy=accuracy, visual=visual, flops=after / before)


@torch.no_grad()
def time_against_dense(model: Any, data: Samples, row: Row, rounds: int = ROUNDS) -> Row:
    """`row` with its speeds: one batch, prefilled and with a few words generated, in turn with the dense model."""
    from tokred.generation import with_pruned_caches

    def generate(function: Any) -> Any:
        return function.generate(**inputs, do_sample=False, min_new_tokens=WORDS, max_new_tokens=WORDS)

    torch._dynamo.reset()
    inputs = data.inputs(slice(BATCH))
    dense = with_pruned_caches(model, lambda function: torch.compile(function, backend="inductor"))
    pair = {"dense": dense, "reduced": _compiled(model, row, "inductor")}
    prefill = interleaved({name: partial(f, **inputs, logits_to_keep=1) for name, f in pair.items()}, rounds)
    whole = interleaved({name: partial(generate, f) for name, f in pair.items()}, rounds)
    return replace(row, prefill=prefill["dense"] / prefill["reduced"], end_to_end=whole["dense"] / whole["reduced"])


def run_demo(
    console: Console, out: Path = Path("out"), rounds: int | None = None, quick: bool = False, speed: bool = False
) -> list[Row]:
    """Score every recipe, print the table and write mosaic.json; `speed` also times them (minutes each)."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    model, data = load(), samples(60 if quick else 200)
    rows = []
    for row in recipes((75,) if quick else LEVELS):
        scored = score(model, data, row)
        console.print(f"{row.recipe}: {scored.total:.1%}")
        if speed:
            scored = time_against_dense(model, data, scored, rounds or ROUNDS)
        rows.append(scored)
    console.print(_table(rows, len(data)))
    written = write_json(rows, out / "mosaic.json", {"torch": torch.__version__, "questions": len(data)})
    console.print(f"wrote {written} in {time.perf_counter() - start:.0f} s")
    return rows


HEADINGS = ("accuracy", *KINDS, "image tokens, mean", "last", "FLOPs", "prefill", "end to end")


def cells(row: Row) -> Iterator[str]:
    """What stands under `HEADINGS`."""
    yield f"{row.total:.1%}"
    yield from (f"{row.accuracy[kind]:.1%}" for kind in KINDS)
    yield from (f"{mean(row.visual):.1f}", f"{row.visual[-1]}", f"{row.flops:.2f}")
    yield from ("" if ratio is None else f"{ratio:.2f}x" for ratio in (row.prefill, row.end_to_end))


def _table(rows: Sequence[Row], questions: int) -> Table:
    from rich.table import Table

    caption = f"held-out digits, {questions} questions; speed is relative to backend=inductor, batch {BATCH}"
    table = Table(title="mosaics of handwritten digits, a small LLaVA", caption=caption)
    table.add_column("removed", justify="right")
    table.add_column("recipe")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for previous, row in zip([None, *rows], rows, strict=False):
        if previous is not None and previous.removed != row.removed:
            table.add_section()
        table.add_row(f"{row.removed} %", row.recipe, *cells(row))
    return table


def write_json(rows: Sequence[Row], path: Path, machine: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps({"machine": dict(machine), "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    return path
