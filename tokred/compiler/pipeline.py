"""The whole way from Dynamo's graph to a callable, as a list of named stages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import fx

from tokred.backends import lower
from tokred.compiler.axes import Axes
from tokred.compiler.blocks import Blocks, find_blocks, renumber
from tokred.compiler.caches import Delivered
from tokred.compiler.capture import CaptureFailed, capture
from tokred.compiler.cost import Gate
from tokred.compiler.extras import Extra, extras_of, fakes_of, keep_sources, with_extras
from tokred.compiler.graphs import as_module
from tokred.compiler.lighten import Lighter, lighten
from tokred.compiler.memory import Memory
from tokred.compiler.options import Options
from tokred.compiler.padded import lower_padded
from tokred.compiler.relaid import while_it_fits
from tokred.compiler.report import GraphReport, PassReport, Refusal
from tokred.compiler.spans import scattered_span
from tokred.compiler.summary import model_name, summarize
from tokred.compiler.verify import verified
from tokred.errors import StrictError, TokredError, in_a_line
from tokred.registry.attention import AttentionRewrite
from tokred.registry.frames import FrameFusion
from tokred.registry.method import Reduction
from tokred.registry.neurons import Chosen
from tokred.registry.sparsify.lora_prune import LoraPrune

if TYPE_CHECKING:
    from tokred.passes.pack_tokens import Packing

__all__ = ["Compiled", "compile_graph", "transform"]

log = logging.getLogger("tokred")

NEVER_MEANT = {"not-causal", "cross-attention", "single-query", "no-residual"}  # what another stack may be refused for

Observer = Callable[[str, fx.GraphModule], None]


@dataclass
class Compiled:
    """A transformed graph, its report, and the sites that acted."""

    graph: fx.GraphModule
    report: GraphReport
    changed: bool = False
    applied: list[Any] = field(default_factory=list)  # the sites that acted, in order
    rewritten: list[Any] = field(default_factory=list)  # blocks that a method computes in another way, or leaves out
    own: int = 0  # how many of its results are the model's
    extras: list[Extra] = field(default_factory=list)  # whose the results behind those are, in their order
    packing: Packing | None = None  # the same graph for a batch with padding
    dense: fx.GraphModule | None = None  # the same graph for a request of which no prompt is known


def compile_graph(
    gm: fx.GraphModule, example_inputs: list[Any], options: Options, observe: Observer
) -> tuple[Callable[..., Any], GraphReport]:
    """transform, then lower. A graph that nothing changed is lowered as Dynamo made it."""
    stages: list[tuple[str, fx.GraphModule]] = []

    def keep(stage: str, graph: fx.GraphModule) -> None:
        if stage != "pack_tokens":  # it takes more inputs; the compiled graph, which calls it, is compared
            stages.append((stage, graph))
        observe(stage, graph)

    done = transform(gm, example_inputs, options, keep if options.verify else observe)
    graph = done.graph if done.changed else gm
    if done.changed:
        keep_sources(graph, gm)
    into = partial(lower, how=options.lower, mode=options.mode, patches=options.inductor)
    if done.packing is None:
        compiled = while_it_fits(into(graph, [*example_inputs, *fakes_of(graph)]), graph)
    else:
        compiled = lower_padded(graph, example_inputs, done.packing, into)
    if options.verify:
        compiled = verified(compiled, stages, done.report)
    dense = None if done.dense is None else _said_once(with_extras(done.dense.forward, done.dense), done.report.model)
    return with_extras(compiled, graph, done.extras, done.own, dense), done.report


def _said_once(dense: Callable[..., Any], model: str) -> Callable[..., Any]:
    """A graph that is run op by op, which is slow."""
    said = False

    def call(*inputs: Any) -> Any:
        nonlocal said
        if not said:
            log.warning("%s: no compiled prompt filled this cache: decoded with all neurons, op by op", model)
        said = True
        return dense(*inputs)

    return call


def transform(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    options: Options,
    observe: Observer,
    *,
    trace: bool = False,
    captured: fx.GraphModule | None = None,
) -> Compiled:
    """The stages up to lowering. What tokred cannot do is never the user's problem: the graph is returned unchanged.

    With `trace` the graph also returns, behind its own results, where each site put its tokens (see reduce_tokens).
    `captured` is what was observed at the stage of that name when this very graph was transformed before.
    """
    report = GraphReport(model=model_name(gm))
    try:
        return _transform(gm, example_inputs, options, observe, report, trace, captured)
    except (CaptureFailed, TokredError) as error:
        if isinstance(error, TokredError):
            raise
        report.notes.append(f"not captured, compiled unchanged: {error}")
    except Exception as error:
        if options.strict:
            raise
        log.debug("the analysis failed", exc_info=True)
        report.notes.append(f"not analysed, compiled unchanged: {type(error).__name__}: {error}")
    log.warning("%s: %s", report.model, report.notes[-1])
    return Compiled(gm, report)


def _transform(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    options: Options,
    observe: Observer,
    report: GraphReport,
    trace: bool,
    captured: fx.GraphModule | None,
) -> Compiled:
    from tokred.passes.drop_dead_tokens import drop_dead_tokens
    from tokred.passes.expand_encoder_layer import expand_encoder_layer
    from tokred.passes.fold_experts import fold_experts
    from tokred.passes.reduce_tokens import reduce_tokens
    from tokred.passes.relu_exact import relu_exact
    from tokred.passes.rewrite_attention import rewrite_attention

    observe("dynamo", gm)
    if captured is None:
        captured = fold_experts(expand_encoder_layer(capture(gm, example_inputs)))
    observe("captured", captured)
    axes = Axes(captured.graph)
    original = find_blocks(captured, axes)  # what the report lists: the model as the user wrote it

    graph = _exact(captured, options, report, observe)
    axes = Axes(graph.graph) if graph is not captured else axes
    blocks = renumber(find_blocks(graph, axes), original) if graph is not captured else original
    if _cuts_dead_layer(options, blocks) or _asks_dead_layer(options, blocks, original):
        report.passes.clear()
        graph = _exact(captured, options, report, observe, leave_out="drop_dead_tokens")
        axes = Axes(graph.graph)
        blocks = renumber(find_blocks(graph, axes), original)
    memory = None
    if options.recipe.of(FrameFusion):
        graph, memory = _fuse_frames(graph, blocks, options, report, observe)
        axes = Axes(graph.graph)
        blocks = renumber(find_blocks(graph, axes), original)
    started = time.perf_counter()
    gate = Gate(graph, blocks, axes, refuse=options.gate)
    reduced = reduce_tokens(graph, blocks, axes, options, gate=gate, inputs=example_inputs, trace=trace)
    if options.recipe.of(Reduction):
        report.passes.append(PassReport("reduce_tokens", False, len(reduced.applied), time.perf_counter() - started))
        observe("reduce_tokens", reduced.graph)

    started = time.perf_counter()
    rewrites = options.recipe.of(AttentionRewrite)
    rewritten = rewrite_attention(reduced.graph, reduced.anchors, rewrites, gate=gate.attention)
    if rewrites:
        seconds = time.perf_counter() - started
        report.passes.append(PassReport("rewrite_attention", False, len(rewritten.applied), seconds))
        observe("rewrite_attention", rewritten.graph)
    light = lighten(rewritten.graph, graph, original, blocks, axes, example_inputs, options, report, gate, observe)
    exact, graph = graph, _plugins("reduce", options, light.graph, report, observe)
    graph = _plugins("cleanup", options, graph, report, observe)
    if options.exact and reduced.applied:  # a score reads few rows; a last layer that was cut may be narrowed now
        whole, graph = graph, _timed("drop_dead_tokens", True, drop_dead_tokens, graph, report)
        if graph is not whole:
            observe("drop_dead_tokens", graph)
    if options.exact:
        unskipped, graph = graph, _timed("relu_exact", True, partial(relu_exact, inputs=example_inputs), graph, report)
        if graph is not unskipped:
            observe("relu_exact", graph)

    summarize(report, captured, original, blocks, axes, reduced, rewritten, light.outcomes, graph)
    if options.texts:
        report.before = captured.print_readable(print_output=False)
        report.after = graph.print_readable(print_output=False)
    _enforce(options, report, reduced, rewritten, light)
    packing = None
    decodes = extras_of(graph) and not options.recipe.of(LoraPrune)
    if memory is None and not decodes:  # of so few tokens none is padding; a recipe's own masks hide none
        packing = _pack(exact if options.recipe.methods else graph, options, report)
    if packing is not None:
        observe("pack_tokens", packing.packed)
    applied = list(reduced.applied.values())
    changed, computed = graph is not captured, [*rewritten.applied, *light.skipped]
    caches = Delivered(reduced.caches) if reduced.caches else None
    extras: list[Extra] = [extra for extra in (memory, caches, light.votes) if extra is not None]
    own = len(captured.graph.output_node().args[0])  # type: ignore[arg-type]
    return Compiled(graph, report, changed, applied, computed, own, extras, packing, light.dense)


def _fuse_frames(
    graph: fx.GraphModule, blocks: Blocks, options: Options, report: GraphReport, observe: Observer
) -> tuple[fx.GraphModule, Memory | None]:
    from tokred.passes.fuse_frames import fuse_frames

    started = time.perf_counter()
    fused = fuse_frames(graph, blocks, options)
    seconds = time.perf_counter() - started
    report.passes.append(PassReport("fuse_frames", False, len(fused.lines), seconds, fused.lines, fused.refusals))
    observe("fuse_frames", fused.graph)
    if options.strict and fused.refusals:
        refusal = fused.refusals[0]
        raise StrictError(f"{refusal.reason} at {refusal.where} [{refusal.code}]")
    return fused.graph, fused.memory


def _exact(
    graph: fx.GraphModule, options: Options, report: GraphReport, observe: Observer, leave_out: str = ""
) -> fx.GraphModule:
    from tokred.passes import exact_passes

    for name, exact, run in exact_passes(options):
        if name != leave_out:
            graph = _timed(name, exact, run, graph, report)
            observe(name, graph)
    return _plugins("exact", options, graph, report, observe)


def _cuts_dead_layer(options: Options, blocks: Blocks) -> bool:
    """Whether a method may cut what enters a layer of which liveness left only the rows that are read."""
    dead = [b for b in blocks.attentions if b.refusal is not None and b.refusal.code == "dead-tokens"]
    image = bool(dead) and ("visual" in options.spans or any(map(scattered_span, blocks.attentions)))
    layer = [method for method in options.recipe.of(Reduction) if method.scope == "layer"]
    cutting = [method for method in layer if image or "visual" not in method.needs]
    return any(method.acts_on(b.layer, b.depth, b.module) for b in dead for method in cutting)


def _asks_dead_layer(options: Options, blocks: Blocks, original: Blocks) -> bool:
    """Whether a method counts what all tokens do in an MLP of which liveness left only the rows that are read."""
    methods = options.recipe.of(Chosen)
    if not methods or len(blocks.mlps) != len(original.mlps):
        return False
    found = zip(blocks.mlps, original.mlps, strict=True)
    dead = [was for mlp, was in found if str(mlp.tokens) != str(was.tokens)]
    return any(method.acts_on(mlp.layer, mlp.depth, mlp.module) for mlp in dead for method in methods)


def _pack(graph: fx.GraphModule, options: Options, report: GraphReport) -> Packing | None:
    """A second graph beside the first: which of them runs is known when the data are."""
    from tokred.passes.pack_tokens import pack_tokens

    if not options.exact:
        return None
    started = time.perf_counter()
    entry = PassReport("pack_tokens", True, 0, 0.0)
    report.passes.append(entry)
    try:
        found = pack_tokens(graph, options)
    except Exception as error:
        found = Refusal("pass-raised", in_a_line(error), "pack_tokens")
        log.warning("pass pack_tokens was left out: %s", found.reason)
    entry.seconds = time.perf_counter() - started
    if isinstance(found, Refusal):
        entry.refusals.append(found)
        return None
    if found is not None:
        entry.changes, entry.lines = found.blocks, [str(found)]
    return found


def _plugins(
    stage: str, options: Options, graph: fx.GraphModule, report: GraphReport, observe: Observer
) -> fx.GraphModule:
    """Plug-ins work on a copy, so that one that edits in place and then fails has changed nothing."""
    from tokred.passes import plugin_passes

    for name, exact, run in plugin_passes(stage, options):
        copy = fx.Graph()
        copy.output(copy.graph_copy(graph.graph, {}))
        result = _timed(name, exact, run, as_module(graph, copy), report)
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
        entry.refusals.append(Refusal("pass-raised", in_a_line(error), name))
        log.warning("pass %s was left out: %s", name, entry.refusals[-1].reason)
        return graph
    finally:
        entry.seconds = time.perf_counter() - started
    entry.changes = len(lines)
    return result


def _enforce(options: Options, report: GraphReport, reduced: Any, rewritten: Any, light: Lighter) -> None:
    refused = [(row.layer, row.method, row.refusal) for row in report.blocks if row.method and row.refusal]
    for block, (method, refusal) in rewritten.refused.items():
        if block in reduced.applied:  # its row says what was applied
            refused.append((block.layer, str(method), refusal))
    for entry in light.outcomes:
        refused += [(block.layer, str(method), refusal) for block, (method, refusal) in entry.refused.items()]
        refused += [(-1, entry.name, refusal) for refusal in getattr(entry, "refusals", ())]
    # recipes for tokens mean the prefill, those for neurons may mean the decoding: which comes in another graph
    refused = [entry for entry in refused if entry[2].code not in ("decode", "prefill")]
    acted = [*rewritten.applied.values(), *light.skipped.values()]
    computed = {str(method) for method, _ in acted}  # an encoder beside them was not meant
    refused = [entry for entry in refused if entry[1] not in computed or entry[2].code not in NEVER_MEANT]
    for layer, method, refusal in refused:
        log.info("%s layer %d: %s refused: %s", report.model, layer, method, refusal.reason)
    if options.strict and refused:
        _, method, refusal = refused[0]
        raise StrictError(f"{method} at {refusal.where}: {refusal.reason} [{refusal.code}]")
