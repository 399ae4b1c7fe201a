"""At each site that the recipe names apply the method's token map, and carry it to everything downstream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from tokred.compiler.axes import Axes
from tokred.compiler.blocks import Attention, Blocks
from tokred.compiler.caches import find_caches
from tokred.compiler.capture import tensor_meta
from tokred.compiler.causal import is_causal
from tokred.compiler.lift import Lift
from tokred.compiler.options import Options
from tokred.compiler.report import Refusal
from tokred.compiler.residual import residual_of
from tokred.compiler.spans import Span, find_span
from tokred.compiler.staging import Rows, Stage, rows_of
from tokred.compiler.suffix import Suffix, follow, special_rows
from tokred.registry.maps import TokenMap, cut_weight
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
    restored: dict[fx.Node, tuple[str, str]] = field(default_factory=dict)
    lengths: dict[fx.Node, dict[int, Any]] = field(default_factory=dict)  # old node -> {dimension: present length}
    caches: list[tuple[int, int, int]] = field(default_factory=list)  # see tokred.compiler.caches.delivering


Gate = Callable[[Attention, Reduction, Place, Any, Suffix], Refusal | None]


def reduce_tokens(
    gm: fx.GraphModule, blocks: Blocks, axes: Axes, options: Options, *, gate: Gate, trace: bool = False
) -> Reduced:
    """Apply the recipe to every site that admits it. What the graph returns is restored, but for KV caches.

    trace   return, behind the graph's own results, [B N] for each site that acted: the row that each token went to

    A site whose method or rewrite raises is refused with that reason and the graph is lifted again without it, so the
    model always runs. Returns the captured graph itself where nothing acts.
    """
    barred: dict[tuple[Attention, str], Refusal] = {}
    while True:
        run = _Run(gm, blocks, axes, options, gate, barred)
        try:
            reduced = run.go(trace=trace)
        except _SiteFailed as failure:
            barred[failure.block, failure.method.name] = failure.refusal
            continue
        return reduced if reduced.applied else Reduced(gm, {}, reduced.refused)


class _SiteFailed(Exception):
    def __init__(self, block: Attention, method: Reduction, refusal: Refusal):
        self.block, self.method, self.refusal = block, method, refusal


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
    ):
        self.gm, self.blocks, self.axes, self.gate, self.barred = gm, blocks, axes, gate, barred
        self.options, self.recipe = options, options.recipe
        self.lift = Lift(gm)
        self.reduced = Reduced(gm)
        self.caches = find_caches(gm, blocks.attentions)
        self.spans: dict[Any, fx.Node] = {}
        self.layers = {(b.axis, b.form, b.layer): b for b in blocks.attentions}

    def go(self, *, trace: bool) -> Reduced:
        attentions = self.blocks.attentions
        inputs = {stream: b for b in attentions if b.join is not None and (stream := residual_of(b.join)) is not None}
        after = {b.stream: b for b in attentions if b.stream is not None}
        before = {b.entry: b for b in attentions if b.entry is not None}
        for node in self.gm.graph.nodes:
            self._guarded(partial(self.lift.visit, node))
            if node in before:
                self._try(before[node], "round_trip")
            if node in after:
                self._try(after[node], "persistent")
            if node in inputs:
                self._try(inputs[node], "layer")
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
            raise _SiteFailed(block, applied.method, _refusal(code, _sentence(error), block)) from error

    # -- one site -----------------------------------------------------------------------------------------------------

    def _try(self, block: Attention, scope: str) -> None:
        for method in self.recipe.methods:
            if block in self.reduced.applied or method.scope != scope:
                continue
            if not method.acts_on(block.layer, block.depth, block.module):
                continue
            refusal = self.barred.get((block, method.name)) or block.refusal or self._apply(block, method)
            if refusal is not None:
                self.reduced.refused.setdefault(block, (method, refusal))

    def _explain_rest(self, block: Attention) -> None:
        """A block without a stream is never a site: its own refusal stands for every method that wanted it."""
        if block in self.reduced.applied or block in self.reduced.refused or block.refusal is None:
            return
        for method in self.recipe.methods:
            if method.acts_on(block.layer, block.depth, block.module):
                self.reduced.refused[block] = (method, block.refusal)
                return

    def _apply(self, block: Attention, method: Reduction) -> Refusal | None:
        trip = method.scope == "round_trip"
        node = {"round_trip": block.entry, "layer": _input_of(block), "persistent": block.stream}[method.scope]
        assert node is not None
        value = self.lift.env[node]
        users = block.entry_users if trip else None
        exits = frozenset([block.join]) if trip else frozenset()
        suffix = follow(node, block.batch_dim, block.token_dim, consumers=users, exits=exits)
        span = find_span(block, self.options.spans)
        place = self._place(block, node, value, suffix, span)
        refusal = self._unfit(block, method, place, span)
        if refusal is not None:
            return refusal
        try:
            removed = method.removed(place)
            if isinstance(removed, int) and removed <= 0:
                return None
            refusal = self.gate(block, method, place, removed, suffix)
            if refusal is not None:
                return refusal
            token_map, reduced = self._plan(block, method, place, span, value)
        except Exception as error:
            return _refusal("method-raised", f"{method.name}: {_sentence(error)}", block)
        stage = self._stage(value, block, place, token_map, reduced, exits)
        self.lift.cut(node, block.batch_dim, block.token_dim, stage, reduced, users)
        note = getattr(self.gate, "notes", {}).get(block, "")
        if span is not None:
            note = "; ".join(part for part in (f"visual rows from {span.found}", note) if part)
        self.reduced.applied[block] = Applied(method, place, stage.length, stage, suffix, note)
        return None

    def _place(self, block: Attention, node: fx.Node, value: Any, suffix: Suffix, span: Span | None) -> Place:
        special = special_rows(node, block.token_dim, self.axes)
        head, tail, grid = special.head, special.tail, special.grid
        rows = _rows(value, block.token_dim)
        length = value.shape[block.token_dim]
        head, tail = max(head, suffix.head), max(tail, suffix.tail)
        if rows is not None:  # rows that were concatenated to this axis later belong to no earlier stage: they stay
            head, tail = max(head, -rows.lo), max(tail, -rows.hi)
        if rows is not None and rows.stage.parent is not None:
            grid = None
        stage = rows.stage if rows is not None else Stage(length)
        gone = stage.root.length - stage.length  # from inside the span, which no earlier map may have left
        count = None
        if span is not None and span.mask is None:
            head, tail = max(head, span.start), max(tail, stage.root.length - span.stop)
        elif span is not None:
            count = span.count - gone
        whole = (length - head - tail if count is None else count) + gone
        if grid is not None and grid[0] * grid[1] != length - head - tail:
            grid = None
        if count is not None:
            grid, head, tail = None, 0, 0
        numbers = {"tokens": length, "head": head, "tail": tail, "span": count, "whole": whole, "grid": grid}
        return Place(layer=block.layer, depth=block.depth, **numbers)

    def _unfit(self, block: Attention, method: Reduction, place: Place, span: Span | None) -> Refusal | None:
        """What the method needs and the site lacks."""
        if "visual" in method.needs and span is None:
            found = "no masked_scatter writes image features into this stream, and options name no rows"
            return _refusal("no-visual-span", f"{found}: spans={{'visual': (first, behind the last)}}", block)
        if method.scope == "layer" and method.probe == "previous" and self._previous(block) is None:
            return _refusal("no-previous-layer", "the scores come from the layer before, and there is none", block)
        later = [b for b in self.caches.cut if b.axis == block.axis and b.layer >= block.layer]
        if later:
            reason = f"layer {later[0].layer} returns only its last keys to its cache, and others would be the last"
            return _refusal("sliding-cache", reason, block)
        if self.caches.whole and block.layer == 0 and method.scope == "layer" and not self.options.companion:
            reason = "the model reads positions off layer 0's cache, which would be short: use tokred.compile(model)"
            return _refusal("first-cache", reason, block)
        if not method.causal_safe and is_causal(block):
            return _refusal("causal", f"{method.name} mixes tokens, and later ones would leak into earlier ones", block)
        if set(method.needs) & {"keys", "queries", "class_token"} and len(tensor_shape(block.key)) not in (3, 4):
            return _refusal(
                "layout",
                f"the keys have {len(tensor_shape(block.key))} dimensions, not samples, heads, tokens, channels",
                block,
            )
        if "class_token" in method.needs and place.head < 1:
            return _refusal(
                "no-class-token", f"{method.name} ranks tokens by the class token's attention, and there is none", block
            )
        if "grid" in method.needs and place.grid is None:
            return _refusal(
                "no-grid",
                f"{method.name} needs the patches' grid, which does not show (or no longer holds) here",
                block,
            )
        if isinstance(place.free, int) and place.free <= 0:
            return _refusal("all-protected", f"all {place.tokens} tokens are protected", block)
        return None

    def _plan(
        self, block: Attention, method: Reduction, place: Place, span: Span | None, value: Any
    ) -> tuple[Any, fx.Node]:
        """Trace the method, and its effect on the stream, into the graph."""
        tensors = self._tensors(block, method, value)
        if place.span is not None:
            assert span is not None and span.mask is not None
            tensors["inside"] = self._inside(span, _rows(value, block.token_dim))
        swap = block.token_dim < block.batch_dim
        numbers: dict[str, Any] = {name: getattr(place, name) for name in Place.__dataclass_fields__}
        prop_attn = (rows := _rows(value, block.token_dim)) is not None and rows.stage.prop_attn
        probed = self._probed(block, method) or block
        scale = probed.scale.meta["val"] if isinstance(probed.scale, fx.Node) else probed.scale

        def function(inputs: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor]:
            hidden = inputs["hidden"].transpose(0, 1) if swap else inputs["hidden"]
            seen: dict[str, Any] = inputs | {"hidden": hidden}
            seen = {name: x.detach() for name, x in seen.items()}  # what decides has no gradient
            token_map = method.plan(Site(**numbers, scale=scale, causal=probed.causal, prop_attn=prop_attn, **seen))
            if not isinstance(token_map, TokenMap):
                raise TypeError(f"plan() returned {type(token_map).__name__}, not a TokenMap")
            reduced = token_map.reduce(hidden)
            return token_map, reduced.transpose(0, 1) if swap else reduced

        token_map, reduced = self.lift.emit(function, tensors)
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
        return token_map, reduced

    def _tensors(self, block: Attention, method: Reduction, value: Any) -> dict[str, Any]:
        """The tensors that the method declared it needs, as [B H N D] or [B N C]."""
        tensors: dict[str, Any] = {"hidden": value.node}
        rows = _rows(value, block.token_dim)
        if rows is not None and rows.stage.size is not None:
            tensors["size"] = (
                self.lift.emit(lambda s: cut_weight(s, rows.lo, rows.hi), rows.stage.size)
                if rows.lo or rows.hi
                else rows.stage.size
            )
        if method.scope == "round_trip":
            return tensors
        batch = value.shape[block.batch_dim]
        if method.scope == "layer":
            if method.probe == "next":
                self._run_ahead(block)
            block = self._probed(block, method) or block
            if block.anchor.target not in _SDPA and len(tensor_shape(block.anchor)) == 4:
                return tensors | {"weights": self.lift.env[block.anchor].node}
        used = self.lift.operands.get(block.anchor, {})

        def operand(name: str, node: fx.Node) -> fx.Node:
            found: fx.Node = (used.get(name) or self.lift.env[node]).node
            return self._heads(found, self._order(block, node), batch)

        if {"keys", "queries", "class_token"} & set(method.needs):
            tensors["key"] = operand("key", block.key)
        if {"queries", "class_token"} & set(method.needs):
            tensors["query"] = operand("query", block.query)
        if isinstance(block.mask, fx.Node):
            mask = operand("attn_mask", block.mask)
            meta = mask.meta["val"]
            if {"queries", "class_token"} & set(method.needs):
                tensors["mask"] = self._rank4(mask)
            if meta.dim() == 4 and not _is_one(meta.shape[0]):
                tensors["valid"] = self.lift.emit(_visible, mask)
        return tensors

    def _previous(self, block: Attention) -> Attention | None:
        return self.layers.get((block.axis, block.form, block.layer - 1))

    def _probed(self, block: Attention, method: Reduction) -> Attention | None:
        """The block whose queries and keys the method sees."""
        return self._previous(block) if method.scope == "layer" and method.probe == "previous" else block

    def _run_ahead(self, block: Attention) -> None:
        """Run an attention on all tokens before its input is cut. What nothing reads of that is dead code later."""
        env, needed, queue = self.lift.env, set(), [block.anchor]
        while queue:
            node = queue.pop()
            if node not in env and node not in needed:
                needed.add(node)
                queue += node.all_input_nodes
        for node in sorted(needed):
            self.lift.visit(node)

    def _inside(self, span: Span, rows: Rows | None) -> fx.Node:
        """[B N] the mask of a span, brought to the present stage of its axis."""
        mask: fx.Node = self.lift.env[span.mask].node  # type: ignore[index]
        count, message = span.count, "tokred: the samples of this batch have different numbers of image tokens"

        def checked(mask: torch.Tensor) -> torch.Tensor:
            torch.ops.aten._assert_async.msg((mask.sum(-1) == count).all(), message)
            return mask.clone()

        for stage in rows.stage.chain if rows is not None else [Stage(0)]:
            if stage.parent is None:
                if ("inside", mask) not in self.spans:
                    self.spans["inside", mask] = self.lift.emit(checked, mask)
                mask = self.spans["inside", mask]
            else:
                if "inside" not in stage.cache:
                    stage.cache["inside"] = self.lift.emit(
                        lambda x, m: m.pick(x.unsqueeze(-1)).squeeze(-1), mask, stage.map
                    )
                mask = stage.cache["inside"]
        return mask

    def _kept_in_caches(self) -> tuple[fx.Node, ...]:
        """For each cache that became shorter, [B K] which of the axis' own rows are left: more results of the graph."""
        extra: dict[Stage, fx.Node] = {}
        own = len(self.gm.graph.output_node().args[0])  # type: ignore[arg-type]
        for node, number in self.caches.whole.items():
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
            self.reduced.caches.append((number, own + list(extra).index(stage), stage.root.length))
        return tuple(extra.values())

    def _order(self, block: Attention, node: fx.Node) -> list[int]:
        """The permutation of an operand's dimensions to [.. tokens D]."""
        rank = len(tensor_shape(node))
        if block.anchor.target in _SDPA:
            return list(range(rank))
        dims, weights = self.axes.of(node), self.axes.of(block.anchor)
        tokens = weights[-1] if node is block.key else weights[-2]
        shared = {atom for dim in weights for atom in dim}
        token = [d for d, dim in enumerate(dims) if dim == tokens]
        inner = [d for d, dim in enumerate(dims) if dim and not set(dim) & shared]
        if len(token) != 1 or len(inner) != 1:
            raise ValueError(f"which dimensions of {node.name} are tokens and head channels does not show")
        return [d for d in range(rank) if d not in (token[0], inner[0])] + [token[0], inner[0]]

    def _heads(self, node: fx.Node, order: list[int], batch: Any) -> fx.Node:
        """[B H N D] from [B H N D] or [B*H N D] in any order."""
        if order == [0, 1, 2, 3]:
            return node

        def function(x: torch.Tensor) -> torch.Tensor:
            x = x.permute(order)
            return x.unflatten(0, (batch, -1)) if len(order) == 3 else x

        result: fx.Node = self.lift.emit(function, node)
        return result

    def _rank4(self, mask: fx.Node) -> fx.Node:
        rank = mask.meta["val"].dim()
        result: fx.Node = (
            mask if rank == 4 else self.lift.emit(lambda m: m.reshape((1,) * (4 - rank) + tuple(m.shape)), mask)
        )
        return result

    def _stage(
        self, value: Any, block: Attention, place: Place, token_map: Any, reduced: fx.Node, exits: frozenset[Any]
    ) -> Stage:
        rows = _rows(value, block.token_dim)
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


def _input_of(block: Attention) -> fx.Node | None:
    """The stream that enters the block's layer, where its norm and its residual join read it."""
    return None if block.join is None else residual_of(block.join)


_SDPA = {torch.ops.aten.scaled_dot_product_attention.default}


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """[B N] whether any query of any head may see the key."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.any(-2).any(1)


def _rows(value: Any, token_dim: int) -> Rows | None:
    factors = value.layout.get(token_dim, ())
    return factors[0] if len(factors) == 1 and isinstance(factors[0], Rows) else None


def tensor_shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _refusal(code: str, reason: str, block: Attention) -> Refusal:
    return Refusal(code, reason, f"{block.module} ({block.source})" if block.module else block.source)


def _sentence(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
