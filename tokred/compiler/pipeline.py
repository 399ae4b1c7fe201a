"""The whole way from Dynamo's graph to a callable, as a list of named stages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from tokred.backends import lower
from tokred.compiler.axes import Axes
from tokred.compiler.blocks import Blocks, find_blocks, renumber
from tokred.compiler.capture import CaptureFailed, capture
from tokred.compiler.options import Options
from tokred.compiler.report import GraphReport, PassReport, Refusal
from tokred.compiler.summary import model_name, summarize
from tokred.errors import StrictError

__all__ = ["Compiled", "compile_graph", "transform"]

log = logging.getLogger("tokred")

Observer = Callable[[str, fx.GraphModule], None]


@dataclass
class Compiled:
    """A transformed graph, its report, and the token maps in it."""

    graph: fx.GraphModule
    report: GraphReport
    changed: bool = False
    maps: list[Any] = field(default_factory=list)


def compile_graph(gm: fx.GraphModule, example_inputs: list[Any], options: Options, observe: Observer) -> tuple[Callable[..., Any], GraphReport]:
    """transform, then lower. A graph that nothing changed is lowered as Dynamo made it."""
    done = transform(gm, example_inputs, options, observe)
    graph = done.graph if done.changed else gm
    return lower(graph, example_inputs, options.lower, mode=options.mode, patches=options.inductor), done.report


def transform(gm: fx.GraphModule, example_inputs: list[Any], options: Options, observe: Observer) -> Compiled:
    """capture -> exact passes -> analyse -> reduce -> report."""
    from tokred.passes import exact_passes
    from tokred.passes.expand_encoder_layer import expand_encoder_layer
    from tokred.passes.reduce_tokens import reduce_tokens

    report = GraphReport(model=model_name(gm))
    observe("dynamo", gm)
    try:
        captured = expand_encoder_layer(capture(gm, example_inputs))
    except CaptureFailed as error:
        report.notes.append(f"not captured, compiled unchanged: {error}")
        log.warning("%s: %s", report.model, report.notes[-1])
        return Compiled(gm, report)
    observe("captured", captured)
    graph = captured
    report.before = graph.print_readable(print_output=False)
    axes = Axes(graph.graph)
    original = find_blocks(graph, axes)
    for name, exact, run in exact_passes(options):
        graph = _timed(name, exact, run, graph, report)
        observe(name, graph)
    graph = _plugins("exact", options, graph, report, observe)
    axes = Axes(graph.graph) if graph is not captured else axes
    blocks = renumber(find_blocks(graph, axes), original) if graph is not captured else original
    started = time.perf_counter()
    gate = _gate(options, graph, blocks, axes)
    reduced = reduce_tokens(graph, blocks, axes, options.recipe, full=options.outputs == "full", gate=gate)
    if options.recipe.methods:
        report.passes.append(PassReport("reduce_tokens", False, len(reduced.applied), time.perf_counter() - started))
        observe("reduce_tokens", reduced.graph)
    graph = reduced.graph
    for stage in ("reduce", "cleanup"):
        graph = _plugins(stage, options, graph, report, observe)
    summarize(report, captured, original, blocks, axes, reduced, graph)
    _enforce(options, report)
    report.after = graph.print_readable(print_output=False)
    return Compiled(graph, report, changed=graph is not captured, maps=list(reduced.applied.items()))


def _plugins(stage: str, options: Options, graph: fx.GraphModule, report: GraphReport, observe: Observer) -> fx.GraphModule:
    """Plug-ins work on a copy, so that one that edits in place and then fails has changed nothing."""
    from tokred.passes import plugin_passes

    for name, exact, run in plugin_passes(stage, options):
        copy = fx.Graph()
        copy.output(copy.graph_copy(graph.graph, {}))
        result = _timed(name, exact, run, fx.GraphModule(graph, copy), report)
        if report.passes[-1].changes and not report.passes[-1].refusals:
            graph = result
            observe(name, graph)
    return graph


def _timed(name: str, exact: bool, run: Any, graph: fx.GraphModule, report: GraphReport) -> fx.GraphModule:
    """Run one pass; if it raises, its graph is not used and the report says so."""
    lines: list[str] = []
    started = time.perf_counter()
    entry = PassReport(name, exact, 0, 0.0, lines)
    report.passes.append(entry)
    try:
        result = run(graph, lines)
        if not isinstance(result, fx.GraphModule):
            raise TypeError(f"the pass returned {type(result).__name__}, not a GraphModule")
        result.graph.lint()
    except Exception as error:
        text = str(error).splitlines()
        entry.refusals.append(Refusal("pass-raised", f"{type(error).__name__}: {text[0] if text else ''}", name))
        log.warning("pass %s was left out: %s", name, entry.refusals[-1].reason)
        return graph
    finally:
        entry.seconds = time.perf_counter() - started
    entry.changes = len(lines)
    return result


def _gate(options: Options, graph: fx.GraphModule, blocks: Blocks, axes: Axes) -> Any:
    from tokred.compiler.cost import Gate

    return Gate(graph, blocks, axes, refuse=options.gate)


def _enforce(options: Options, report: GraphReport) -> None:
    refused = [block for block in report.blocks if block.refusal is not None and block.method is not None]
    for block in refused:
        assert block.refusal is not None
        log.info("%s layer %d: %s refused: %s", report.model, block.layer, block.method, block.refusal.reason)
    if options.strict and refused:
        block = refused[0]
        assert block.refusal is not None
        raise StrictError(f"{block.method} at {block.refusal.where}: {block.refusal.reason} [{block.refusal.code}]")
