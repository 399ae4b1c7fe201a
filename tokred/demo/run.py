"""`tokred demo`: a real model on real digits, every method at several ratios; accuracy, tokens, FLOPs, speed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import torch
import torch._dynamo
from torch import Tensor, nn

import tokred
from tokred.bench import interleaved
from tokred.demo.data import digits, split
from tokred.demo.model import load

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from tokred.compiler.report import GraphReport

__all__ = ["RECIPES", "Row", "plot_rows", "run_demo", "write_json"]

BATCH = 54  # ten batches are the 540 held-out digits, so no batch is padded and one compilation serves all
TOKENS = 65
ROUNDS = 9
EXACT = "exact passes only"
DENSE = 'backend="inductor"'
SHOWN = "tome(r=8)"  # the recipe of report.html

# The methods meet at equal numbers of patches, 49 or 36 of 64 (squares, so that a coarser grid has them too), from one
# layer on: a fair comparison, and most generated kernels are shared, so a cold run is short. --quick takes
# the first recipe of each method.
RECIPES: dict[str, tuple[str, ...]] = {
    "random": ("random(keep=0.56, layers=[1])", "random(keep=0.76, layers=[1])"),
    "norm": ("norm(keep=0.56, layers=[1])", "norm(keep=0.76, layers=[1])"),
    "pool": ("pool(keep=0.56, layers=[1])", "pool(keep=0.76, layers=[1])"),
    "evit": ("evit(keep=0.54, layers=[1])", "evit(keep=0.74, layers=[1])"),  # and the fused token
    "tome": ("tome(r=28, layers=[1])", "tome(r=15, layers=[1])"),
    "tofu": ("tofu(r=28, layers=[1])", "tofu(r=15, layers=[1])"),
    "pitome": ("pitome(keep=0.56, layers=[1])", "pitome(keep=0.76, layers=[1])"),
    "expedit": ("expedit(layer=1, grid=(6, 6))", "expedit(layer=1, grid=(7, 7))"),
    "tomesd": ("tomesd(ratio=0.44, use_rand=False)", "tomesd(ratio=0.24, use_rand=False)"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table. `flops` and `speed` are relative to the dense model."""

    method: str
    recipe: str
    accuracy: float
    tokens_last: int
    tokens_mean: float
    flops: float
    speed: float = 1.0


@dataclass
class Candidate:
    """A compiled variant, and what is known of it before it is timed."""

    row: Row
    function: Callable[[Tensor], Tensor]


def run_demo(console: Console, out: Path = Path("out"), rounds: int | None = None, quick: bool = False) -> list[Row]:
    """Compile, score and time everything, print the table, and write report.html, accuracy_speed.png and demo.json."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    start = time.perf_counter()
    rounds = rounds or (5 if quick else ROUNDS)
    out.mkdir(parents=True, exist_ok=True)
    recipes = _recipes(quick)
    model, (images, labels) = load(), digits(split()[1])
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Dynamo counts all variants as recompilations of one forward, and would run the ninth uncompiled.
    many = torch._dynamo.config.patch(recompile_limit=2 * (2 + len(recipes)))
    with torch.no_grad(), many, Progress(*bar, console=console, transient=True) as progress:
        task = progress.add_task("", total=2 + len(recipes) + rounds)
        candidates = []
        with _warming([recipe for _, recipe in reversed(recipes)]):
            for method, recipe in [(DENSE, None), (EXACT, None), *recipes]:
                progress.update(task, description=f"compiling {recipe or method}")
                candidates.append(_candidate(model, images, labels, method, recipe))
                if not console.is_terminal:  # a log file has no progress bar
                    row = candidates[-1].row
                    console.print(f"{row.recipe}: {row.accuracy:.1%}")
                progress.advance(task)
        rows = _timed(candidates, images[:BATCH], rounds, progress, task)
    console.print(_table(rows, rounds))
    page = tokred.explain(model, images[:BATCH], recipe=SHOWN).to_html(out / "report.html")
    written = (page, write_json(rows, out / "demo.json"), plot_rows(rows, out / "accuracy_speed.png"))
    console.print(f"wrote {', '.join(str(path) for path in written)} in {time.perf_counter() - start:.0f} s")
    return rows


@contextmanager
def _warming(recipes: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Compile `recipes` into Inductor's cache in a second process as well; it is gone when the block ends."""
    command = [sys.executable, "-m", "tokred.demo.warm", *recipes]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it started
        process.wait()


def _recipes(quick: bool) -> list[tuple[str, str]]:
    """Method and recipe, for the registered methods; a method of a plug-in has no ratios to show here."""
    registered = tokred.methods()
    return [
        (method, recipe)
        for method, recipes in RECIPES.items()
        if method in registered
        for recipe in (recipes[:1] if quick else recipes)
    ]


def _candidate(model: nn.Module, images: Tensor, labels: Tensor, method: str, recipe: str | None) -> Candidate:
    """Compile one variant and score it with the very function that will be timed."""
    seen = len(tokred.reports().graphs)
    torch.manual_seed(0)  # for `random`
    if method == DENSE:
        function = torch.compile(model, backend="inductor")
    else:
        function = torch.compile(model, backend="tokred", options=None if recipe is None else {"recipe": recipe})
    guesses = torch.cat([function(part).argmax(dim=-1) for part in images.split(BATCH)])
    accuracy = float((guesses == labels).double().mean())
    graphs = tokred.reports().graphs[seen:]
    tokens, mean_tokens, flops = _reduction(graphs) if graphs else (TOKENS, TOKENS, 1.0)
    return Candidate(Row(method, recipe or method, accuracy, tokens, mean_tokens, flops), function)


def _reduction(graphs: Sequence[GraphReport]) -> tuple[int, float, float]:
    """Tokens after the last attention block, their mean over the blocks, and FLOPs relative to before."""
    tokens = [int(block.tokens[1]) for graph in graphs for block in graph.blocks if block.kind == "attention"]
    before, after = (sum(graph.flops[i] for graph in graphs) for i in (0, 1))
    return tokens[-1], mean(tokens), after / before


def _timed(candidates: list[Candidate], images: Tensor, rounds: int, progress: Progress, task: TaskID) -> list[Row]:
    """The rows with their speed relative to the first, dense, candidate."""
    progress.update(task, description="timing, interleaved")
    calls = {each.row.recipe: partial(each.function, images) for each in candidates}
    seconds = interleaved(calls, rounds, tick=lambda: progress.advance(task))
    dense = seconds[DENSE]
    return [replace(each.row, speed=dense / seconds[each.row.recipe]) for each in candidates]


def _table(rows: Sequence[Row], rounds: int) -> Table:
    from rich.table import Table

    table = Table(
        title=f"handwritten digits, batch {BATCH}, {torch.get_num_threads()} threads",
        caption=f"FLOPs and speed are relative to {DENSE}; speed is the ratio of medians of {rounds} interleaved calls",
    )
    table.add_column("recipe", no_wrap=True)
    for heading in ("accuracy", "tokens, last", "tokens, mean", "FLOPs", "speed"):
        table.add_column(heading, justify="right")
    for previous, row in zip([None, *rows], rows, strict=False):
        if previous is not None and previous.method != row.method:
            table.add_section()
        table.add_row(
            row.recipe,
            f"{row.accuracy:.1%}",
            f"{row.tokens_last}",
            f"{row.tokens_mean:.1f}",
            f"{row.flops:.2f}",
            f"{row.speed:.2f}x",
        )
    return table


def write_json(rows: Sequence[Row], path: Path) -> Path:
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "batch": BATCH}
    path.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    return path


def plot_rows(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy against speed: a line for each method, the dense model as the level to keep."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global pyplot state
    axes = figure.add_subplot()
    for method in dict.fromkeys(row.method for row in rows):
        points = sorted((row.speed, 100 * row.accuracy) for row in rows if row.method == method)
        fixed = method in (DENSE, EXACT)
        axes.plot(*zip(*points, strict=True), marker="*" if fixed else "o", markersize=13 if fixed else 6, label=method)
    axes.axhline(100 * rows[0].accuracy, color="0.6", linewidth=0.8, linestyle="--")
    axes.set(xlabel=f"speed relative to {DENSE}", ylabel="accuracy on the held-out digits, %")
    axes.set_title("token reduction without training, digits ViT")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    return path
