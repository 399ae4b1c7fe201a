"""What methods make of the weights, after tokens were reduced: one pass after the other, each on what the last left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx

from tokred.compiler.axes import Axes
from tokred.compiler.blocks import Blocks, find_blocks, renumber
from tokred.compiler.cost import Gate
from tokred.compiler.options import Options
from tokred.compiler.relaid import held, values_of
from tokred.compiler.report import GraphReport, PassReport
from tokred.registry.neurons import Chosen, Sparsity
from tokred.registry.skip import Skip
from tokred.registry.sparsify.adaptive_width import AdaptiveWidth
from tokred.registry.sparsify.lora_prune import LoraPrune

__all__ = ["Lighter", "lighten"]

Observer = Callable[[str, fx.GraphModule], None]


@dataclass
class Lighter:
    """The graph that reads fewer weights, and what each pass did, in order.

    skipped    the blocks that are left out, and by which method
    votes      who takes the graph's last results, where it is a prompt's that chooses neurons
    dense      the same graph without what a prompt chose, where it cannot be called without a prompt
    """

    graph: fx.GraphModule
    outcomes: list[Any] = field(default_factory=list)
    skipped: dict[Any, Any] = field(default_factory=dict)
    votes: Any = None
    dense: fx.GraphModule | None = None


def lighten(
    gm: fx.GraphModule,
    exact: fx.GraphModule,
    original: Blocks,
    blocks: Blocks,
    axes: Axes,
    inputs: list[Any],
    options: Options,
    report: GraphReport,
    gate: Gate,
    observe: Observer,
) -> Lighter:
    """Leave out blocks, fold low-rank branches, put learners in the place of MLPs, leave out neurons.

    exact      the graph as the exact passes left it, `blocks` its blocks on `axes`
    original   the model's blocks, as the user wrote it
    """
    done, left = Lighter(gm), original

    def now() -> tuple[Blocks, Axes]:
        """The blocks of the present graph, with their layers' numbers in the model."""
        if done.graph is exact:
            return blocks, axes
        present = Axes(done.graph.graph)
        return renumber(find_blocks(done.graph, present), left), present

    def step(name: str, exactly: bool, run: Callable[[Blocks, Axes], Any]) -> Any:
        started = time.perf_counter()
        outcome = run(*now())
        done.outcomes.append(outcome)
        done.graph = outcome.graph
        lines, refusals = getattr(outcome, "lines", []), getattr(outcome, "refusals", [])
        changes, seconds = len(lines) or len(outcome.applied), time.perf_counter() - started
        report.passes.append(PassReport(name, exactly, changes, seconds, lines, refusals))
        observe(name, outcome.graph)
        return outcome

    if skips := options.recipe.of(Skip):
        from tokred.passes.skip_blocks import skip_blocks

        skipped = step("skip_blocks", False, lambda found, _: skip_blocks(done.graph, found, original, skips))
        left, done.skipped = skipped.left, skipped.applied
    if loras := options.recipe.of(LoraPrune):
        from tokred.passes.fold_loras import fold_loras

        step("fold_loras", True, lambda found, _: fold_loras(done.graph, found, loras, values_of(done.graph, inputs)))
    if learners := options.recipe.of(AdaptiveWidth):
        from tokred.passes.adapt_width import adapt_width

        step("adapt_width", False, lambda found, _: adapt_width(done.graph, found, learners))
    if methods := options.recipe.of(Sparsity):
        from tokred.passes.sparsify import sparsify

        before, (found, present) = done.graph, now()
        parameters = {node.name: value for node, value in values_of(before, inputs).items()}
        run: Any = partial(sparsify, before, original, found, present, parameters=parameters, gate=gate)
        run = partial(run, calibration=options.calibration)
        sparse = step("sparsify", False, lambda *_: run(methods, companion=options.companion))
        done.votes = sparse.votes
        if sparse.gathered:
            report.notes.append(f"what a prompt chose is gathered behind it: {sparse.gathered / 2**20:.1f} MiB")
            done.dense = run(tuple(method for method in methods if not isinstance(method, Chosen))).graph
    report.notes += held(done.graph)
    return done
