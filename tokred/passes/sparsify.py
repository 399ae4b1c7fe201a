"""At each MLP and attention that the recipe names leave out a part of what linears read, as the method says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx

from tokred.compiler.axes import Axes
from tokred.compiler.blocks import Attention, Blocks, Mlp
from tokred.compiler.calibration import Calibration
from tokred.compiler.capture import tensor_meta
from tokred.compiler.cost import Gate, Skipped
from tokred.compiler.linears import linear_of
from tokred.compiler.neurons import NeuronSite, decodes, find_experts, find_neurons, prompts
from tokred.compiler.relaid import erase_unused_copies
from tokred.compiler.report import Refusal
from tokred.compiler.requests import Votes
from tokred.errors import in_a_line
from tokred.passes.choose_blocks import block_masked, unsplit
from tokred.passes.choose_neurons import Choosing
from tokred.passes.fewer_neurons import masked
from tokred.passes.graph_edit import copy_graph, keep_output_strides, refresh
from tokred.passes.outcome import Outcome
from tokred.passes.skip_weights import Skipping, readable
from tokred.registry.neurons import Blockwise, Chosen, Sparsity, Threshold

__all__ = ["Sparsified", "sparsify"]

Block = Mlp | Attention


@dataclass
class Sparsified(Outcome[Block, Sparsity]):
    """What sparsify did.

    votes      who takes the graph's last results, where it is a prompt's that chooses neurons
    gathered   how many bytes of weights are gathered for each request, where it decodes with chosen neurons
    """

    votes: Votes | None = None
    gathered: int = 0


def sparsify(
    gm: fx.GraphModule,
    original: Blocks,
    blocks: Blocks,
    axes: Axes,
    methods: tuple[Sparsity, ...],
    *,
    calibration: Calibration | None,
    parameters: Mapping[str, Tensor],
    gate: Gate,
    companion: bool = False,
) -> Sparsified:
    """Mask values where the methods say so; the first method that acts on a block has it to itself.

    original     the model as the user wrote it, which says whether this graph decodes
    blocks       those of `gm`, found on these axes, with their layers' numbers in the model
    parameters   by the names of the graph's placeholders
    gate         what skipping weights is worth, and whether that is asked
    companion    see Options
    """
    done = Sparsified(gm)
    choosing = Choosing(gm, blocks, axes, original, parameters, companion=companion)
    chosen: list[tuple[NeuronSite, Sparsity]] = []
    for block, sites in _by_block(find_neurons(gm, blocks)).items():
        for method in methods:
            place = sites[0].place
            if block in done.applied or not method.acts_on(place.layer, place.depth, place.module):
                continue
            mine = [site for site in sites if site.place.role in method.acts_at]
            mine = mine[:1] if isinstance(method, Blockwise) else mine
            refusal = _unfit(block, method, mine, original, calibration, parameters, choosing)
            if refusal is not None:
                done.refused.setdefault(block, (method, refusal))
                continue
            told = [_told(site, method, calibration, parameters, gm) for site in mine]
            lacking = next((reason for site in told if (reason := method.lacks(site.place))), "")
            if lacking:
                done.refused.setdefault(block, (method, Refusal("no-allocation", lacking, _where(block))))
                continue
            told = [site for site in told if not method.idle(site.place)]
            if told:
                said = [_words(site, method, parameters, len(told), choosing) for site in told]
                skipped = [_skipped(site, method) for site in told if _spares(site, method, parameters, choosing)]
                note, refusal = gate.neurons(block, skipped)
                if refusal is not None:
                    done.refused.setdefault(block, (method, refusal))
                    continue
                chosen += [(site, method) for site in told]
                done.applied[block] = (method, "; ".join([*said, note] if note else said))
    for block in done.applied:
        done.refused.pop(block, None)
    experts = find_experts(gm, blocks)
    depth = max((1 + mlp.layer for mlp in (*blocks.mlps, *experts)), default=0)
    for mlp in experts:
        for method in methods:
            if {"gate", "up", "down"} & set(method.acts_at) and method.acts_on(mlp.layer, depth, mlp.module):
                reason = (
                    "each token has experts of its own, whose weights lie stacked: no operator skips parts of these"
                )
                done.refused.setdefault(mlp, (method, Refusal("experts", reason, _where(mlp))))
    _rewrite(done, gm, chosen, methods, parameters, choosing)
    return done


def _by_block(sites: Iterable[NeuronSite]) -> dict[Block, list[NeuronSite]]:
    found: dict[Block, list[NeuronSite]] = {}
    for site in sites:
        found.setdefault(site.block, []).append(site)
    return found


def _unfit(
    block: Block,
    method: Sparsity,
    sites: list[NeuronSite],
    original: Blocks,
    calibration: Calibration | None,
    parameters: Mapping[str, Tensor],
    choosing: Choosing,
) -> Refusal | None:
    """Why a method has nothing to do here; None if it has."""
    where = _where(block)
    if not sites and isinstance(block, Mlp) and method.acts_at == ("gate",):
        return Refusal("not-gated", f"{method.name} thresholds the gate of an MLP, and this one has none", where)
    if not sites:
        return None
    if isinstance(method, Chosen):
        if (refusal := choosing.unfit(sites[0], method)) is not None:
            return refusal
    elif method.phase == "decode" and not decodes(original):
        if prompts(original):
            return Refusal("prefill", f"{method.name} acts on one token a sequence; phase='masked' on all", where)
        return Refusal("no-decode", f"{method.name} acts while decoding, which this is no model for", where)
    if any(linear.weight is None for site in sites for linear in site.linears) or not all(s.linears for s in sites):
        return Refusal("weight", "the weight of one of its linears is computed, and no parameter", where)
    if isinstance(method, Blockwise) and (reason := unsplit(sites[0], parameters)):
        return Refusal("weight", reason, where)
    if method.calibrated and calibration is None:
        how = f"calibration=tokred.calibrate(model, batches, recipe={method.name!r})"
        return Refusal("no-calibration", f"{method.name} takes its thresholds from a calibration: {how}", where)
    return None


def _where(block: Block) -> str:
    return f"{block.module} ({block.source})" if block.module else block.source


def _told(
    site: NeuronSite,
    method: Sparsity,
    calibration: Calibration | None,
    parameters: Mapping[str, Tensor],
    gm: fx.GraphModule,
) -> NeuronSite:
    """The site with what the calibration measured there. Raises CalibrationError if it is of another model."""
    if calibration is None or not method.calibrated:
        return site
    for linear in site.linears:
        weight: Any = linear.weight
        value = parameters[weight.name] if weight.op == "placeholder" else getattr(gm, weight.target)
        found = calibration.measured(site.measured, linear.name, value)
    return site.at(sketch=found.sketch, shares=found.shares)


def _words(site: NeuronSite, method: Sparsity, parameters: Mapping[str, Tensor], of: int, choosing: Choosing) -> str:
    words = choosing.words(site, method) if isinstance(method, Chosen) else method.words(site.place)
    if _skips(method) and (reason := readable(site, parameters)):
        words = f"{words} by masking: {reason}"
    return f"{site.place.role}: {words}" if of > 1 else words


def _skipped(site: NeuronSite, method: Sparsity) -> Skipped:
    """What a method leaves unread at a site, if what a calibration found holds."""
    values = tensor_meta(site.values)
    assert values is not None
    if isinstance(method, Chosen):
        linears = [*site.block.inputs, *site.block.outputs]  # type: ignore[union-attr]
        sizes = [meta.numel() for linear in linears if (meta := tensor_meta(linear.weight)) is not None]
        return Skipped(values, sum(sizes), 0, method.kept(site.place) / site.place.size, together=True)
    linears, up = list(site.linears), None
    if site.place.role == "gate" and isinstance(site.block, Mlp) and site.block.gating is not None:
        up = linear_of(site.block.gating.up.linear)
        linears = [*site.block.outputs, *([] if up is None else [up])]
    weights = [meta for linear in linears if (meta := tensor_meta(linear.weight)) is not None]
    sizes = [weight.numel() for weight in weights]
    if up is not None and site.block.form == "packed":
        sizes[-1] //= 2
    return Skipped(values, sum(sizes), len(linears), _active(site, method))


def _active(site: NeuronSite, method: Sparsity) -> float:
    """The share of values that is expected to be left of one token; 1 if nobody knows."""
    place = site.place
    if isinstance(method, Blockwise):
        return method.left(place.size) / method.blocks(place.size)
    if place.sketch is None or not isinstance(method, Threshold):
        return 1.0
    return 1 - place.sketch.share(method.threshold_at(place))


def _skips(method: Sparsity) -> bool:
    """Whether weights are skipped where they can be; else all is computed and masked."""
    return isinstance(method, (Threshold, Blockwise)) and method.phase == "decode"


def _spares(site: NeuronSite, method: Sparsity, parameters: Mapping[str, Tensor], choosing: Choosing) -> bool:
    """Whether this graph reads fewer weights at a site."""
    if isinstance(method, Chosen):
        return choosing.decodes_fewer(site, method)
    return _skips(method) and not readable(site, parameters)


def _rewrite(
    done: Sparsified,
    gm: fx.GraphModule,
    chosen: list[tuple[NeuronSite, Sparsity]],
    methods: tuple[Sparsity, ...],
    parameters: Mapping[str, Tensor],
    choosing: Choosing,
) -> None:
    """Write what was decided into a copy of the graph; where a method raises it is refused at the whole block."""
    copy = copy_graph(gm)
    copies = dict(zip(gm.graph.nodes, copy.graph.nodes, strict=True))
    skipping = Skipping(copy.graph, copies, parameters)
    choosing.begin()
    changed: list[fx.Node] = []
    for site, method in chosen:
        try:
            if isinstance(method, Chosen):
                changed += choosing.write(copy.graph, copies, site, method)
            elif _skips(method) and not readable(site, parameters):
                changed += _skip(skipping, site, method)
            else:
                changed.append(_mask(copy.graph, copies, site, method))
        except Exception as error:
            reason = f"{method.name}: {in_a_line(error)}"
            done.refused[site.block] = (method, Refusal("method-raised", reason, _where(site.block)))
            del done.applied[site.block]
            others = [(other, its) for other, its in chosen if other.block is not site.block]
            _rewrite(
                done, gm, others, methods, parameters, choosing
            )  # anew: the block's other sites may be written already
            return
    if changed:
        refresh(copy.graph, changed)
        keep_output_strides(copy, gm)
    choosers = any(isinstance(method, Chosen) and method.phase == "decode" for method in methods)
    done.votes, done.gathered = choosing.finish(copy.graph) if choosers else None, choosing.size
    if changed or choosing.keys:
        copy.graph.eliminate_dead_code()
        erase_unused_copies(copy.graph)
        copy.recompile()
        done.graph = copy


def _skip(skipping: Skipping, site: NeuronSite, method: Sparsity) -> list[fx.Node]:
    """Let operators that skip weights compute what a method defines; returns what is new in the graph."""
    place, active = site.place, _active(site, method)
    if isinstance(method, Threshold):
        threshold = method.threshold_at(place)
        if place.role != "gate":
            return skipping.inputs(site.linears, threshold, active)
        new = skipping.gated(site, threshold, active)
        if new:
            return new
    gate = _mask(skipping.graph, skipping.copies, site, method)
    if isinstance(method, Blockwise) and place.role == "gate":
        new = skipping.gated(site, 0.0, active, gate)
        if new:
            return [gate, *new]
    return [gate, *skipping.inputs(site.block.outputs, 0.0, active)]  # type: ignore[union-attr]


def _mask(graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], site: NeuronSite, method: Sparsity) -> fx.Node:
    """Let what reads the site's values read the masked ones, which are returned."""
    if isinstance(method, Blockwise):
        return block_masked(graph, copies, site, method)
    return masked(graph, copies, site, partial(method.masked, place=site.place))
