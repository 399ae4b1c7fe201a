"""At each site that the recipe names apply the method's token map, and carry it to everything downstream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from tokred.compiler.axes import Axes
from tokred.compiler.blocks import Attention, Blocks
from tokred.compiler.caches import find_caches
from tokred.compiler.capture import tensor_meta
from tokred.compiler.causal import is_causal
from tokred.compiler.lift import Lift
from tokred.compiler.options import Options
from tokred.compiler.report import Refusal
from tokred.compiler.spans import Span, Spans
from tokred.compiler.staging import Stage, rows_of
from tokred.compiler.suffix import Suffix, follow
from tokred.errors import in_a_line
from tokred.passes.compact_positions import CODE, CompactPositions
from tokred.passes.detours import Detour, Detours
from tokred.passes.site_tensors import SiteTensors, number, rows_at, tower_of
from tokred.passes.sites import node_to_cut, place_of, refuse, unfit
from tokred.registry.maps import TokenMap
from tokred.registry.method import Reduction
from tokred.registry.site import Place, Site

__all__ = ["Applied", "Reduced", "reduce_tokens"]


@dataclass
class Applied:
    """A method that acted at a block, and the nodes of its token map in the new graph."""

    method: Reduction
    place: Place
    after: Any  # tokens left
    stage: Stage
    suffix: Suffix
    note: str = ""


@dataclass
class Reduced:
    """The rewritten graph, what acted where, and why not elsewhere."""

    graph: fx.GraphModule
    applied: dict[Attention, Applied] = field(default_factory=dict)
    refused: dict[Attention, tuple[Reduction, Refusal]] = field(default_factory=dict)
    returned: dict[Attention, tuple[Reduction, Any, Any]] = field(default_factory=dict)  # tokens before and after
    restored: dict[fx.Node, tuple[str, str]] = field(default_factory=dict)
    lengths: dict[fx.Node, dict[int, Any]] = field(default_factory=dict)  # old node -> {dimension: present length}
    caches: list[tuple[int, int, int]] = field(default_factory=list)  # see tokred.compiler.caches.Delivered
    anchors: dict[Attention, fx.Node] = field(default_factory=dict)  # what computes each attention now


SCOPES = ("round_trip", "persistent", "layer")  # in the order in which they act where they meet at one node

Gate = Callable[[Attention, Reduction, Place, Any, Suffix], Refusal | None]


def reduce_tokens(
    gm: fx.GraphModule,
    blocks: Blocks,
    axes: Axes,
    options: Options,
    *,
    gate: Gate,
    inputs: list[Any],
    trace: bool = False,
) -> Reduced:
    """Apply the recipe to every site that admits it. What the graph returns is restored, but for KV caches.

    inputs  the graph's inputs in this call
    trace   return, behind the graph's own results, [B N] for each site that acted: the row that each token went to

    A site whose method or rewrite raises is refused with that reason and the graph is lifted again without it, so the
    model always runs. Returns the captured graph itself where nothing acts.
    """
    barred: dict[tuple[Attention, str], Refusal] = {}
    spans = Spans(gm, options.spans, inputs)
    while True:
        run = _Run(gm, blocks, axes, options, gate, barred, spans)
        try:
            reduced = run.go(trace=trace)
        except _SiteFailed as failure:
            barred |= failure.sites
            continue
        if reduced.applied:
            return reduced
        spans.forget()
        return Reduced(gm, {}, reduced.refused, anchors={block: block.anchor for block in blocks.attentions})


class _SiteFailed(Exception):
    """What must not act, by block and method, and why."""

    def __init__(self, sites: dict[tuple[Attention, str], Refusal]):
        self.sites = sites


class _Run:
    """One attempt at lifting the whole graph."""

    def __init__(
        self,
        gm: fx.GraphModule,
        blocks: Blocks,
        axes: Axes,
        options: Options,
        gate: Gate,
        barred: dict[tuple[Attention, str], Refusal],
        spans: Spans,
    ):
        self.gm, self.blocks, self.axes, self.gate, self.barred = gm, blocks, axes, gate, barred
        self.options, self.methods = options, options.recipe.of(Reduction)
        self.lift = Lift(gm)
        self.reduced = Reduced(gm)
        self.caches = find_caches(gm, blocks.attentions)
        self.detours = Detours(self.lift)
        self.suffixes: dict[tuple[Attention, bool, frozenset[Any]], Suffix] = {}
        self.spans = {b: spans.of(b, "visual") for b in blocks.attentions}
        self.tensors = SiteTensors(self.lift, axes, blocks, spans)
        self.positions = CompactPositions(gm, blocks.attentions, self.lift, self.tensors)

    def go(self, *, trace: bool) -> Reduced:
        attentions = self.blocks.attentions
        sites = {
            (node, scope): b for scope in SCOPES for b in attentions if (node := node_to_cut(b, scope)) is not None
        }
        for node in self.gm.graph.nodes:
            self._guarded(partial(self.detours.visit, node))
            for scope in SCOPES:
                if (node, scope) in sites:
                    self._try(sites[node, scope], scope)
        self._guarded(self.positions.prove)
        self._check_caches()
        for block in attentions:
            self._explain_rest(block)
        groups = tuple(self._groups(applied.stage) for applied in self.reduced.applied.values()) if trace else ()
        kept = self._guarded(self._kept_in_caches) if self.options.companion else ()
        full = self.options.outputs == "full"
        self.reduced.graph = self._guarded(
            lambda: self.lift.finish(full=full, short=self.caches.whole, extra=(*kept, *groups))
        )
        self.reduced.restored = self.lift.restored
        self.reduced.lengths = self._lengths()
        self.reduced.anchors = {block: self.lift.env[block.anchor].node for block in attentions}
        return self.reduced

    def _guarded(self, step: Callable[[], Any]) -> Any:
        """Whatever fails downstream of a cut is charged to the latest one."""
        try:
            return step()
        except Exception as error:
            if not self.reduced.applied:
                raise
            block, applied = next(reversed(self.reduced.applied.items()))
            code = "shape-mismatch" if type(error).__name__ == "ShapeMismatch" else "rewrite-failed"
            raise _SiteFailed({(block, applied.method.name): refuse(code, in_a_line(error), block)}) from error

    def _check_caches(self) -> None:
        """Keys of tokens that are gone are nobody's: what is made of them may stay short as a cache, or not be cut."""
        sites = {}
        for node, reader in self.caches.other.items():
            cuts = {stage for _, _, rows in rows_of(self.lift.env[node].layout) for stage in rows.stage.chain}
            reason = (
                f"layer {reader.layer} returns something made of its keys or values that is no cache as tokred knows it"
            )
            for block, applied in self.reduced.applied.items():
                if applied.stage in cuts:
                    sites[block, applied.method.name] = refuse("unknown-cache", reason, block)
        if sites:
            raise _SiteFailed(sites)

    # -- one site -----------------------------------------------------------------------------------------------------

    def _try(self, block: Attention, scope: str) -> None:
        for method in self.methods:
            if block in self.reduced.applied or method.scope != scope:
                continue
            if not self._means(method, block):
                continue
            if method.scope == "layer" and method.restores(block.layer, block.depth):
                self._guarded(partial(self._bring_back, block, method))
            refusal = (
                self.barred.get((block, method.name)) or self._standing(block, method) or self._apply(block, method)
            )
            if refusal is not None:
                self.reduced.refused.setdefault(block, (method, refusal))

    def _bring_back(self, block: Attention, method: Reduction) -> None:
        """All tokens are in the stream again, as they were before each was dropped; later cuts start from all."""
        node = node_to_cut(block, method.scope)
        assert node is not None
        value = self.lift.env[node]
        rows = rows_at(value, block.token_dim)
        if rows is None or rows.stage.parent is None:
            return
        whole = self.lift.aligner.restore(value)
        self.lift.env[node] = whole
        self.reduced.returned[block] = (method, value.shape[block.token_dim], whole.shape[block.token_dim])

    def _explain_rest(self, block: Attention) -> None:
        """A block without a stream is never a site: its own refusal stands for every method that wanted it."""
        if block in self.reduced.applied or block in self.reduced.refused or block.refusal is None:
            return
        for method in self.methods:
            if self._means(method, block) and (refusal := self._standing(block, method)) is not None:
                self.reduced.refused[block] = (method, refusal)
                return

    def _means(self, method: Reduction, block: Attention) -> bool:
        """Whether the method is asked here: a visual one is not asked in the encoder that made the image tokens."""
        elsewhere = "visual" in method.needs and self.spans[block] is None and any(self.spans.values())
        return not elsewhere and method.acts_on(block.layer, block.depth, block.module)

    def _standing(self, block: Attention, method: Reduction) -> Refusal | None:
        """Why the method could act at no time at this block; the plainest reason first."""
        alive = block.refusal is None or block.refusal.code == "dead-tokens"  # which is this method's own concern
        if alive and "visual" in method.needs_at(block.layer, block.depth) and self.spans[block] is None:
            why = self.tensors.spans.why_none(block)
            return refuse("no-visual-span", f"{why}: spans={{'visual': (first, behind the last)}}", block)
        return block.refusal

    def _apply(self, block: Attention, method: Reduction) -> Refusal | None:
        trip = method.scope == "round_trip"
        node = node_to_cut(block, method.scope)
        assert node is not None
        value = self.lift.env[node]
        users = block.entry_users if trip else None
        exits = frozenset([block.join]) if trip else frozenset()
        end = self.blocks.end_of_layer(block) if method.skips else None
        around = exits if end is None else frozenset([end])
        suffix = self._follow(node, block, trip, around)
        span = self.spans[block]
        place = place_of(block, node, value, suffix, span, self.tensors)
        companion = self.options.companion
        refusal = unfit(block, method, place, span, self.tensors, self.caches, companion=companion)
        compact = self.options.positions == "compact" and is_causal(block)
        if refusal is None and compact and (reason := self.positions.why_not(block, method)):
            refusal = refuse(CODE, reason, block)
        if refusal is not None:
            return refusal
        try:
            removed = method.removed(place)
            if isinstance(removed, int) and removed <= 0:
                return None
            if isinstance(left := place.tokens - removed, int) and left <= 0:
                return refuse("nothing-left", f"{method.name} would remove all {place.tokens} tokens", block)
            refusal = self.gate(block, method, place, removed, suffix)
            if refusal is not None:
                return refusal
            token_map, reduced, weight = self._plan(block, method, place, span, value)
        except Exception as error:
            return refuse("method-raised", f"{method.name}: {in_a_line(error)}", block)
        stage = self._stage(value, block, place, token_map, reduced, exits)
        stage.ordered, stage.compact = method.merges == "visual" and is_causal(block), compact
        if compact:
            self.positions.assert_consecutive(block, stage)
        self.lift.cut(node, block.batch_dim, block.token_dim, stage, reduced, users)
        if end is not None and weight is not None:
            self.detours.open(end, Detour(block, value, stage, token_map, weight))
        wants = method.wants_at(block.layer, block.depth)
        blind = span is not None and "tower" in wants and self.tensors.tower(span, method) is None
        parts = [f"visual rows from {span.found}"] if span is not None else []
        parts += ["no vision encoder shows" if blind else "", *self.tensors.labels.found(block, method)]
        parts += [getattr(self.gate, "notes", {}).get(block, ""), "compact positions" if compact else ""]
        parts += ["the others go around this layer"] if end is not None else []
        note = "; ".join(part for part in parts if part)
        self.reduced.applied[block] = Applied(method, place, stage.length, stage, suffix, note)
        return None

    def _follow(self, node: fx.Node, block: Attention, trip: bool, exits: frozenset[Any]) -> Suffix:
        """The same for each method that is asked here."""
        key = block, trip, exits
        if key not in self.suffixes:
            users = block.entry_users if trip else None
            self.suffixes[key] = follow(node, block.batch_dim, block.token_dim, consumers=users, exits=exits)
        return self.suffixes[key]

    def _plan(
        self, block: Attention, method: Reduction, place: Place, span: Span | None, value: Any
    ) -> tuple[Any, fx.Node, fx.Node | None]:
        """Trace the method, its effect on the stream, and what it weighs rows by that go around, into the graph."""
        tensors = self.tensors.of(block, method, place, value, span)
        swap = block.token_dim < block.batch_dim
        numbers: dict[str, Any] = {name: getattr(place, name) for name in Place.__dataclass_fields__}
        rows, probed = rows_at(value, block.token_dim), self.tensors.probed(block, method)
        numbers |= {"scale": number(probed.scale), "causal": probed.causal}
        numbers |= {"prop_attn": rows is not None and rows.stage.prop_attn}
        tower = None if span is None else self.tensors.tower(span, method)
        before_that = self.tensors.probed(probed, method)

        def site_of(inputs: dict[str, Any]) -> Site:
            seen = dict(inputs)
            if "earlier" in seen:
                own = {"scale": number(before_that.scale), "causal": before_that.causal}
                seen["earlier"] = Site(**numbers | own, **seen["earlier"] | {"hidden": seen["hidden"]})
            if "tower" in seen:
                seen["tower"] = tower_of(tower, seen["tower"])
            return Site(**numbers, **seen)

        def function(inputs: dict[str, Any]) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
            inputs = inputs | {"hidden": inputs["hidden"].transpose(0, 1)} if swap else inputs
            token_map = method.plan(site_of(tree_map(torch.Tensor.detach, inputs)))  # what decides has no gradient
            if not isinstance(token_map, TokenMap):
                raise TypeError(f"plan() returned {type(token_map).__name__}, not a TokenMap")
            site = site_of(inputs)
            reduced = token_map.reduce(method.revise(site, token_map))
            weight = method.weigh(site) if method.skips else None
            return token_map, reduced.transpose(0, 1) if swap else reduced, weight

        token_map, reduced, weight = self.lift.emit(function, tensors)
        before, after = tensor_meta(tensors["hidden"]), tensor_meta(reduced)
        assert before is not None and after is not None
        kept = after.shape[block.token_dim]
        if (
            isinstance(kept, int)
            and isinstance(place.tokens, int)
            and not place.head + place.tail <= kept < place.tokens
        ):
            raise ValueError(
                f"the map leaves {kept} of {place.tokens} tokens, {place.head + place.tail} of them protected"
            )
        return token_map, reduced, weight

    def _kept_in_caches(self) -> tuple[fx.Node, ...]:
        """For each cache that became shorter, [B K] which of the axis' own rows are left: more results of the graph."""
        extra: dict[Stage, fx.Node] = {}
        for node, place in self.caches.whole.items():
            value = self.lift.env[node]
            staged = [f for _, _, f in rows_of(value.layout)]
            if not staged or staged[0].stage.parent is None:
                continue
            stage, batch = staged[0].stage, value.shape[0]
            if stage not in extra:
                length, maps = stage.root.length, [s.map for s in stage.chain[1:]]

                def rows(like: torch.Tensor, maps: list[TokenMap], batch: Any = batch, length: Any = length) -> Any:
                    index = torch.arange(length, device=like.device).expand(batch, -1)
                    for token_map in maps:
                        index = token_map.pick(index.unsqueeze(-1)).squeeze(-1)
                    return index

                extra[stage] = self.lift.emit(rows, value.node, maps)
            self.reduced.caches.append((place, list(extra).index(stage), stage.root.length))
        return tuple(extra.values())

    def _stage(
        self, value: Any, block: Attention, place: Place, token_map: Any, reduced: fx.Node, exits: frozenset[Any]
    ) -> Stage:
        rows = rows_at(value, block.token_dim)
        parent = rows.stage if rows is not None else Stage(value.shape[block.token_dim])
        head, tail, length = place.head, place.tail, reduced.meta["val"].shape[block.token_dim]
        if rows is not None and (rows.lo or rows.hi):  # the map in the coordinates of the stage, not of this value
            lo, hi, before = rows.lo, rows.hi, place.tokens
            token_map = self.lift.emit(lambda m: m.window(-lo, -hi, before), token_map)
            head, tail, length = head + lo, tail + hi, length + lo + hi
        size = token_map.sizes
        if size is None and parent.size is not None:
            size = self.lift.emit(lambda m, s: m.pull(s), token_map, parent.size)
        prop = token_map.prop_attn or (parent.prop_attn and size is not None)
        return Stage(length, parent, token_map, head, tail, size, prop, exits)

    def _groups(self, stage: Stage) -> fx.Node:
        assert stage.parent is not None
        length = stage.parent.length
        node: fx.Node = self.lift.emit(lambda m: m.groups(length), stage.map)
        return node

    def _lengths(self) -> dict[fx.Node, dict[int, Any]]:
        lengths = {}
        for node, value in self.lift.env.items():
            if getattr(value, "staged", False):
                lengths[node] = dict(enumerate(value.shape))
        return lengths
