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
from tokred.compiler.caches import delivering
from tokred.compiler.capture import CaptureFailed, capture
from tokred.compiler.cost import Gate
from tokred.compiler.memory import Memory, carrying
from tokred.compiler.options import Options
from tokred.compiler.padded import lower_padded
from tokred.compiler.relaid import held, lower_relaid, relaid_inputs, values_of
from tokred.compiler.report import GraphReport, PassReport, Refusal
from tokred.compiler.spans import scattered_span
from tokred.compiler.summary import model_name, summarize
from tokred.compiler.verify import verified
from tokred.errors import StrictError, TokredError
from tokred.registry.attention import AttentionRewrite
from tokred.registry.frames import FrameFusion
from tokred.registry.method import Reduction
from tokred.registry.neurons import Sparsity
from tokred.registry.sparsify.adaptive_width import AdaptiveWidth
from tokred.registry.sparsify.lora_prune import LoraPrune

if TYPE_CHECKING:
    from tokred.passes.adapt_width import Adapted
    from tokred.passes.fold_loras import Folded
    from tokred.passes.pack_tokens import Packing
    from tokred.passes.sparsify import Sparsified

__all__ = ["Compiled", "compile_graph", "transform"]

log = logging.getLogger("tokred")

NEVER_MEANT = {"not-causal", "cross-attention", "single-query"}  # what no AttentionRewrite of causal attention computes

Observer = Callable[[str, fx.GraphModule], None]


@dataclass
class Compiled:
    """A transformed graph, its report, and the sites that acted."""

    graph: fx.GraphModule
    report: GraphReport
    changed: bool = False
    applied: list[Any] = field(default_factory=list)  # the sites that acted, in order
    rewritten: list[Any] = field(default_factory=list)  # the attentions that a method computes in another way
    caches: list[tuple[int, int, int]] = field(default_factory=list)  # see tokred.compiler.caches.delivering
    packing: Packing | None = None  # the same graph for a batch with padding
    memory: Memory | None = None  # what the graph carries from call to call, as more inputs and results


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
    into = partial(lower, how=options.lower, mode=options.mode, patches=options.inductor)
    if done.memory is not None:
        more = graph.graph.find_nodes(op="placeholder")[len(example_inputs) :]
        example_inputs = [*example_inputs, *(node.meta["val"] for node in more if "relaid" not in node.meta)]
    if done.packing is None:
        compiled = lower_relaid(graph, example_inputs, into)
    else:
        compiled = lower_padded(graph, example_inputs, done.packing, into)
    if options.verify:
        compiled = verified(compiled, stages, done.report)
    compiled = delivering(compiled, done.caches) if done.caches else compiled
    return (compiled if done.memory is None else carrying(compiled, done.memory)), done.report


def transform(
    gm: fx.GraphModule, example_inputs: list[Any], options: Options, observe: Observer, *, trace: bool = False
) -> Compiled:
    """The stages up to lowering. What tokred cannot do is never the user's problem: the graph is returned unchanged.

    With `trace` the graph also returns, behind its own results, where each site put its tokens (see reduce_tokens).
    """
    report = GraphReport(model=model_name(gm))
    try:
        return _transform(gm, example_inputs, options, observe, report, trace)
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
    gm: fx.GraphModule, example_inputs: list[Any], options: Options, observe: Observer, report: GraphReport, trace: bool
) -> Compiled:
    from tokred.passes.expand_encoder_layer import expand_encoder_layer
    from tokred.passes.fold_experts import fold_experts
    from tokred.passes.reduce_tokens import reduce_tokens
    from tokred.passes.relu_exact import relu_exact
    from tokred.passes.rewrite_attention import rewrite_attention

    observe("dynamo", gm)
    captured = fold_experts(expand_encoder_layer(capture(gm, example_inputs)))
    observe("captured", captured)
    axes = Axes(captured.graph)
    original = find_blocks(captured, axes)  # what the report lists: the model as the user wrote it

    graph = _exact(captured, options, report, observe)
    axes = Axes(graph.graph) if graph is not captured else axes
    blocks = renumber(find_blocks(graph, axes), original) if graph is not captured else original
    if _cuts_dead_layer(options, blocks):  # its cache would hold what the recipe drops
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
    folded = _fold_loras(rewritten.graph, graph, original, blocks, example_inputs, options, report)
    if options.recipe.of(LoraPrune):
        observe("fold_loras", folded.graph)
    adapted = _adapt_width(folded.graph, graph, original, blocks, options, report)
    if options.recipe.of(AdaptiveWidth):
        observe("adapt_width", adapted.graph)
    sparse = _sparsify(adapted.graph, graph, original, blocks, example_inputs, options, report, gate)
    report.notes += held(sparse.graph)
    if options.recipe.of(Sparsity):
        observe("sparsify", sparse.graph)
    exact, graph = graph, _plugins("reduce", options, sparse.graph, report, observe)
    graph = _plugins("cleanup", options, graph, report, observe)
    if options.exact:
        unskipped, graph = graph, _timed("relu_exact", True, partial(relu_exact, inputs=example_inputs), graph, report)
        if graph is not unskipped:
            observe("relu_exact", graph)

    summarize(report, captured, original, blocks, axes, reduced, rewritten, [folded, adapted, sparse], graph)
    if options.texts:
        report.before = captured.print_readable(print_output=False)
        report.after = graph.print_readable(print_output=False)
    _enforce(options, report, reduced, rewritten, folded, [adapted, sparse])
    packing = None
    decodes = relaid_inputs(graph) and not options.recipe.of(LoraPrune)
    if memory is None and not decodes:  # of so few tokens none is padding; a recipe's own masks hide none
        packing = _pack(exact if options.recipe.methods else graph, options, report)
    if packing is not None:
        observe("pack_tokens", packing.packed)
    applied = list(reduced.applied.values())
    changed, computed = graph is not captured, list(rewritten.applied)
    return Compiled(graph, report, changed, applied, computed, reduced.caches, packing, memory)


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
        text = str(error).splitlines()
        found = Refusal("pass-raised", f"{type(error).__name__}: {text[0] if text else ''}", "pack_tokens")
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


def _fold_loras(
    gm: fx.GraphModule,
    exact: fx.GraphModule,
    original: Blocks,
    blocks: Blocks,
    example_inputs: list[Any],
    options: Options,
    report: GraphReport,
) -> Folded:
    """What becomes of low-rank branches, before methods read the linears beside them. `blocks` are `exact`'s."""
    from tokred.passes.fold_loras import Folded, fold_loras

    methods = options.recipe.of(LoraPrune)
    if not methods:
        return Folded(gm)
    started = time.perf_counter()
    if gm is not exact:
        blocks = renumber(find_blocks(gm, Axes(gm.graph)), original)
    done = fold_loras(gm, blocks, methods, values_of(gm, example_inputs))
    seconds = time.perf_counter() - started
    report.passes.append(PassReport("fold_loras", True, len(done.lines), seconds, done.lines, done.refusals))
    return done


def _adapt_width(
    gm: fx.GraphModule, exact: fx.GraphModule, original: Blocks, blocks: Blocks, options: Options, report: GraphReport
) -> Adapted:
    """Imported learners in the place of MLPs. `blocks` are `exact`'s."""
    from tokred.passes.adapt_width import Adapted, adapt_width

    methods = options.recipe.of(AdaptiveWidth)
    if not methods:
        return Adapted(gm)
    started = time.perf_counter()
    if gm is not exact:
        blocks = renumber(find_blocks(gm, Axes(gm.graph)), original)
    done = adapt_width(gm, blocks, methods)
    report.passes.append(PassReport("adapt_width", False, len(done.applied), time.perf_counter() - started))
    return done


def _sparsify(
    gm: fx.GraphModule,
    exact: fx.GraphModule,
    original: Blocks,
    blocks: Blocks,
    example_inputs: list[Any],
    options: Options,
    report: GraphReport,
    gate: Gate,
) -> Sparsified:
    """What methods leave out of MLPs and linears, after tokens were reduced. `blocks` are `exact`'s."""
    from tokred.passes.sparsify import Sparsified, sparsify

    methods = options.recipe.of(Sparsity)
    if not methods:
        return Sparsified(gm)
    started = time.perf_counter()
    if gm is not exact:
        blocks = renumber(find_blocks(gm, Axes(gm.graph)), original)
    parameters = {node.name: value for node, value in values_of(gm, example_inputs).items()}
    done = sparsify(gm, original, blocks, methods, options.calibration, parameters, gate=gate)
    report.passes.append(PassReport("sparsify", False, len(done.applied), time.perf_counter() - started))
    return done


def _enforce(
    options: Options, report: GraphReport, reduced: Any, rewritten: Any, folded: Folded, lighter: list[Any]
) -> None:
    refused = [(row.layer, row.method, row.refusal) for row in report.blocks if row.method and row.refusal]
    for block, (method, refusal) in rewritten.refused.items():
        if block in reduced.applied:  # its row says what was applied
            refused.append((block.layer, str(method), refusal))
    for entry in lighter:
        refused += [(block.layer, str(method), refusal) for block, (method, refusal) in entry.refused.items()]
    refused += [(-1, LoraPrune.name, refusal) for refusal in folded.refusals]
    # recipes for tokens mean the prefill, those for neurons may mean the decoding: which comes in another graph
    refused = [entry for entry in refused if entry[2].code not in ("decode", "prefill")]
    computed = {str(method) for method, _ in rewritten.applied.values()}  # an encoder beside them was not meant
    refused = [entry for entry in refused if entry[1] not in computed or entry[2].code not in NEVER_MEANT]
    for layer, method, refusal in refused:
        log.info("%s layer %d: %s refused: %s", report.model, layer, method, refusal.reason)
    if options.strict and refused:
        _, method, refusal = refused[0]
        raise StrictError(f"{method} at {refusal.where}: {refusal.reason} [{refusal.code}]")
