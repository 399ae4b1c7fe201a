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
from tokred.compiler.capture import tensor_meta
from tokred.compiler.causal import is_causal
from tokred.compiler.lift import Lift
from tokred.compiler.report import Refusal
from tokred.compiler.staging import Rows, Stage
from tokred.compiler.suffix import Suffix, follow, special_rows
from tokred.registry.maps import TokenMap, cut_weight
from tokred.registry.method import Reduction
from tokred.registry.recipe import Recipe
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


Gate = Callable[[Attention, Reduction, Place, Any, Suffix], Refusal | None]


def reduce_tokens(
    gm: fx.GraphModule, blocks: Blocks, axes: Axes, recipe: Recipe, *, full: bool, gate: Gate, trace: bool = False
) -> Reduced:
    """Apply `recipe` to every site that admits it.

    full    restore the tokens of what the graph returns
    trace   return, behind the graph's own results, [B N] for each site that acted: the row that each token went to

    A site whose method or rewrite raises is refused with that reason and the graph is lifted again without it, so the
    model always runs. Returns the captured graph itself where nothing acts.
    """
    barred: dict[tuple[Attention, str], Refusal] = {}
    while True:
        run = _Run(gm, axes, recipe, gate, barred)
        try:
            reduced = run.go(blocks, full=full, trace=trace)
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
        self, gm: fx.GraphModule, axes: Axes, recipe: Recipe, gate: Gate, barred: dict[tuple[Attention, str], Refusal]
    ):
        self.gm, self.axes, self.recipe, self.gate, self.barred = gm, axes, recipe, gate, barred
        self.lift = Lift(gm)
        self.reduced = Reduced(gm)

    def go(self, blocks: Blocks, *, full: bool, trace: bool) -> Reduced:
        after = {b.stream: b for b in blocks.attentions if b.stream is not None}
        before = {b.entry: b for b in blocks.attentions if b.entry is not None}
        for node in self.gm.graph.nodes:
            self._guarded(partial(self.lift.visit, node))
            if node in before:
                self._try(before[node], "round_trip")
            if node in after:
                self._try(after[node], "persistent")
        for block in blocks.attentions:
            self._explain_rest(block)
        groups = tuple(self._groups(applied.stage) for applied in self.reduced.applied.values()) if trace else ()
        self.reduced.graph = self._guarded(lambda: self.lift.finish(full=full, extra=groups))
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
        node = block.entry if trip else block.stream
        assert node is not None
        value = self.lift.env[node]
        users = block.entry_users if trip else None
        exits = frozenset([block.join]) if trip else frozenset()
        suffix = follow(node, block.batch_dim, block.token_dim, consumers=users, exits=exits)
        place = self._place(block, node, value, suffix)
        refusal = self._unfit(block, method, place)
        if refusal is not None:
            return refusal
        try:
            removed = method.removed(place)
            if isinstance(removed, int) and removed <= 0:
                return None
            refusal = self.gate(block, method, place, removed, suffix)
            if refusal is not None:
                return refusal
            token_map, reduced = self._plan(block, method, place, node, value)
        except Exception as error:
            return _refusal("method-raised", f"{method.name}: {_sentence(error)}", block)
        stage = self._stage(value, block, place, token_map, reduced, exits)
        self.lift.cut(node, block.batch_dim, block.token_dim, stage, reduced, users)
        note = getattr(self.gate, "notes", {}).get(block, "")
        self.reduced.applied[block] = Applied(method, place, stage.length, stage, suffix, note)
        return None

    def _place(self, block: Attention, node: fx.Node, value: Any, suffix: Suffix) -> Place:
        special = special_rows(node, block.token_dim, self.axes)
        head, tail, grid = special.head, special.tail, special.grid
        rows = _rows(value, block.token_dim)
        length = value.shape[block.token_dim]
        head, tail = max(head, suffix.head), max(tail, suffix.tail)
        if rows is not None:  # rows that were concatenated to this axis later belong to no earlier stage: they stay
            head, tail = max(head, -rows.lo), max(tail, -rows.hi)
        if rows is not None and rows.stage.parent is not None:
            grid = None
        if grid is not None and grid[0] * grid[1] != length - head - tail:
            grid = None
        return Place(layer=block.layer, depth=block.depth, tokens=length, head=head, tail=tail, grid=grid)

    def _unfit(self, block: Attention, method: Reduction, place: Place) -> Refusal | None:
        """What the method needs and the site lacks."""
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
        self, block: Attention, method: Reduction, place: Place, node: fx.Node, value: Any
    ) -> tuple[Any, fx.Node]:
        """Trace the method, and its effect on the stream, into the graph."""
        tensors = self._tensors(block, method, value)
        swap = block.token_dim < block.batch_dim
        numbers: dict[str, Any] = {name: getattr(place, name) for name in Place.__dataclass_fields__}
        prop_attn = (rows := _rows(value, block.token_dim)) is not None and rows.stage.prop_attn
        scale = block.scale.meta["val"] if isinstance(block.scale, fx.Node) else block.scale

        def function(inputs: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor]:
            hidden = inputs["hidden"].transpose(0, 1) if swap else inputs["hidden"]
            seen: dict[str, Any] = inputs | {"hidden": hidden}
            seen = {name: x.detach() for name, x in seen.items()}  # what decides has no gradient
            token_map = method.plan(Site(**numbers, scale=scale, prop_attn=prop_attn, **seen))
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
