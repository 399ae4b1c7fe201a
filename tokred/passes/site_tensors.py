"""What a method sees at a site: the tensors that it declared it needs, found in the graph that is being lifted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from tokred.compiler.axes import Axes
from tokred.compiler.blocks import Attention, Blocks
from tokred.compiler.causal import is_causal
from tokred.compiler.lift import Lift
from tokred.compiler.relations import Op, same
from tokred.compiler.residual import residual_of
from tokred.compiler.spans import Span, Spans
from tokred.compiler.staging import Rows, Stage
from tokred.compiler.suffix import only_parameters
from tokred.compiler.towers import Tower as Encoder
from tokred.compiler.towers import find_tower
from tokred.passes.labels import Labels
from tokred.registry.maps import cut_weight
from tokred.registry.method import Reduction
from tokred.registry.site import Place, Site, Tower

__all__ = ["RAGGED", "SiteTensors", "number", "rows_at", "shape_of", "tower_of", "visible"]

SDPA = {torch.ops.aten.scaled_dot_product_attention.default}
RAGGED = "tokred: the samples of this batch have different numbers of image tokens"
PROBED = {"keys", "queries", "class_token"}  # what comes from an attention's operands


class SiteTensors:
    """Nodes of the new graph for a method's `Site`; what they need and nobody computed yet is emitted."""

    def __init__(self, lift: Lift, axes: Axes, blocks: Blocks, spans: Spans):
        self.lift, self.axes, self.blocks = lift, axes, blocks
        self.mlps = {(mlp.axis, mlp.layer): mlp for mlp in blocks.mlps if mlp.axis}
        self.prepared: dict[tuple[Any, ...], fx.Node] = {}
        self.layers = {(b.axis, b.form, b.layer): b for b in blocks.attentions}
        self.towers: dict[fx.Node, Encoder | None] = {}
        self.spans, self.labels = spans, Labels(self, spans)

    def of(self, block: Attention, method: Reduction, place: Place, value: Any, span: Span | None) -> dict[str, Any]:
        """By the names that `Site` gives them: [B H N D] or [B N C], in whichever order the graph has them."""
        tensors: dict[str, Any] = {"hidden": value.node}
        rows = rows_at(value, block.token_dim)
        if rows is not None and rows.stage.size is not None:
            tensors["size"] = (
                self.lift.emit(lambda s: cut_weight(s, rows.lo, rows.hi), rows.stage.size)
                if rows.lo or rows.hi
                else rows.stage.size
            )
        stage = rows.stage if rows is not None else Stage(value.shape[block.token_dim])
        tensors["spans"] = self.labels.of(block, method, stage)
        if span is not None and span.mask is not None and span.count is not None:
            tensors["inside"] = self.labels.inside(span, rows, whole=method.merges == "visual" and is_causal(block))
        wanted = {*method.needs_at(block.layer, block.depth), *method.wants_at(block.layer, block.depth)}
        if "tower" in wanted and span is not None and (tower := self.tower(span, method)) is not None:
            if rows is None or rows.stage.parent is None:
                tensors["tower"] = self._tower(tower, method, value.shape[block.batch_dim])
        if "neurons" in wanted and (neurons := self.neurons(block)) is not None:
            batch, width = value.shape[block.batch_dim], shape_of(neurons)[-1]
            tensors["neurons"] = self.lift.emit(lambda x: x.reshape(batch, -1, width), self.lift.env[neurons].node)
        if "prepared" in wanted:
            tensors["prepared"] = self._prepared(block, method, place, rows, span)
        shorter = rows is not None and rows.stage.parent is not None  # the mask is cut to that where it is used
        if method.scope == "layer" and method.probe == "next" and (PROBED & wanted or shorter):
            self.run_ahead(block.anchor)
        if method.scope == "round_trip":
            return tensors
        probed, batch = self.probed(block, method), value.shape[block.batch_dim]
        if "earlier" in wanted:
            earlier = tensors["earlier"] = self._attention(self.probed(probed, method), method, wanted, batch)
            seen = [shape_of(earlier[name])[2] for name in ("query", "key", "weights") if name in earlier]
            if not all(same(length, value.shape[block.token_dim]) for length in seen):
                raise ValueError("tokens were removed between the two layers whose attention is compared")
        return tensors | self._attention(probed, method, wanted, batch)

    def tower(self, span: Span, method: Reduction | None = None) -> Encoder | None:
        """The vision encoder behind a span, if it still has all of its own tokens where the method looks."""
        if span.features is None:
            return None
        if span.features not in self.towers:
            self.towers[span.features] = find_tower(span.features, self.blocks.attentions)
        tower = self.towers[span.features]
        if tower is None:
            return None
        seen = [tower.stream, *(node for block in self._encoder(tower, method) for node in (block.query, block.key))]
        return None if any(self.lift.env[node].staged for node in seen) else tower

    def images(self, span: Span) -> int | None:
        """How many images of each sample the encoder made the span of, as many tokens of each, where that shows."""
        tower = self.tower(span)
        each: Any = None if tower is None else shape_of(tower.stream)[1] - tower.first
        fits = isinstance(each, int) and span.count is not None and span.count % each == 0
        return span.count // each if fits else None

    def _encoder(self, tower: Encoder, method: Reduction | None) -> list[Attention]:
        """The attentions of a vision encoder that the method looks at, the last one first."""
        last = tower.attention
        if method is None:
            return [last]
        return [last, *(self.layers[last.axis, last.form, n] for n in method.encoder_layers(last.layer + 1))]

    def neurons(self, block: Attention) -> fx.Node | None:
        """What the last linear of the MLP before an attention reads, [B N F] or [B*N F]."""
        mlp = self.mlps.get((block.axis, block.layer - 1))
        if mlp is None or block.batch_dim != 0:
            return None
        op = Op(mlp.down)
        found = op.arguments.get("input", op.arguments.get("mat1"))
        rows = [id(atom) for dim in self.axes.of(found)[:-1] for atom in dim] if isinstance(found, fx.Node) else []
        return found if tuple(rows[-len(block.axis) :]) == block.axis else None

    def previous(self, block: Attention) -> Attention | None:
        """The attention of the layer before."""
        return self.layers.get((block.axis, block.form, block.layer - 1))

    def probed(self, block: Attention, method: Reduction) -> Attention:
        """The attention whose queries and keys the method sees."""
        before = self.previous(block) if method.scope == "layer" and method.probe == "previous" else None
        return before or block

    # -- attention ----------------------------------------------------------------------------------------------------

    def _attention(self, block: Attention, method: Reduction, needs: set[str], batch: Any) -> dict[str, Any]:
        reads = bool(PROBED & needs)
        if reads and method.scope == "layer" and block.anchor.target not in SDPA and len(shape_of(block.anchor)) == 4:
            return {"weights": self.lift.env[block.anchor].node}
        used = self.lift.operands.get(block.anchor, {})
        tensors: dict[str, Any] = {}

        def operand(name: str, node: fx.Node) -> fx.Node:
            found: fx.Node = (used.get(name) or self.lift.env[node]).node
            return self._heads(found, self._order(block, node), batch)

        if reads:
            tensors["key"] = operand("key", block.key)
        if {"queries", "class_token"} & needs:
            tensors["query"] = operand("query", block.query)
        seen = self.visibility(block, used)
        if not {"queries", "class_token"} & needs:
            seen.pop("mask", None)
        return tensors | seen

    def visibility(self, block: Attention, used: dict[str, Any]) -> dict[str, fx.Node]:
        """The attention's mask [B|1 1|H 1|N N], and which tokens it shows to any query, [B N]."""
        if not isinstance(block.mask, fx.Node):
            return {}
        if block.mask not in self.lift.env:  # in front of the first layer, which reads it first
            self.run_ahead(block.mask)
        node: fx.Node = (used.get("attn_mask") or self.lift.env[block.mask]).node
        mask = self._heads(node, self._order(block, block.mask), None)
        tensors = {"mask": self._rank4(mask)}
        if mask.meta["val"].dim() == 4 and _is_of_samples(block, shape_of(mask)[0]):
            tensors["valid"] = self.lift.emit(visible, mask)
        return tensors

    def run_ahead(self, last: fx.Node) -> None:
        """Run a node, such as an attention, before its input is cut. What nothing reads of that is dead code later."""
        env, needed, queue = self.lift.env, set(), [last]
        while queue:
            node = queue.pop()
            if node not in env and node not in needed:
                needed.add(node)
                queue += node.all_input_nodes
        for node in sorted(needed):
            self.lift.visit(node)

    def _order(self, block: Attention, node: fx.Node) -> list[int]:
        """The permutation of an operand's dimensions to [.. tokens D]."""
        rank = len(shape_of(node))
        if block.anchor.target in SDPA:
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

    # -- vision -------------------------------------------------------------------------------------------------------

    def _tower(self, tower: Encoder, method: Reduction, batch: Any) -> dict[str, Any]:
        """The tensors of a `Site`'s tower, and what the projector's ops take beside the rows: see `tower_of`."""
        blocks, first = self._encoder(tower, method), tower.first
        operands = [
            self._heads(self.lift.env[node].node, self._order(block, node), shape_of(tower.stream)[0])
            for block in blocks
            for node in (block.query, block.key)
        ]
        scales = [number(block.scale) for block in blocks]

        def function(stream: Tensor, *operands: Tensor) -> dict[str, Tensor]:
            rows: list[Tensor] = []  # [I T] each
            for query, key, scale in zip(operands[::2], operands[1::2], scales, strict=True):
                numbers: dict[str, Any] = {"layer": 0, "depth": 1, "tokens": stream.shape[1], "scale": scale}
                images = Site(hidden=stream, query=query, key=key, **numbers)
                flow = None if first else images.flow(torch.ones_like(stream[:, :, 0])) / stream.shape[1]
                rows.append((images.attention(row=0) if flow is None else flow).mean(1)[:, first:])
            seen = {"hidden": stream[:, first:], "key": operands[1].mean(1)[:, first:], "attention": rows[0]}
            whole = {name: x.reshape(batch, -1, *x.shape[2:]) for name, x in seen.items()}
            earlier = [row.reshape(batch, -1) for row in rows[1:]]
            return whole | {"earlier": torch.stack(earlier, 1) if earlier else whole["attention"][:, None][:, :0]}

        fields: dict[str, Any] = self.lift.emit(function, self.lift.env[tower.stream].node, *operands)
        nodes = [node.all_input_nodes[1:] for node in tower.projector]
        return fields | {"projector": [[self.lift.env[arg].node for arg in args] for args in nodes]}

    # -- computed once ------------------------------------------------------------------------------------------------

    def _prepared(
        self, block: Attention, method: Reduction, place: Place, rows: Rows | None, span: Span | None
    ) -> fx.Node:
        """[B N] of what `method.prepare` says of the tokens that entered layer 0, brought to the present stage."""
        stages = rows.stage.chain if rows is not None else [Stage(place.tokens)]
        if rows is not None and (rows.lo or rows.hi):
            raise ValueError("tokens that did not enter layer 0 stand beside those that did")
        first = self.layers[block.axis, block.form, 0]
        key = (str(method), block.axis)  # lists among its options have no hash
        if key not in self.prepared:
            self.prepared[key] = self._prepare(first, method, place, stages[0], span)
        node = self.prepared[key]
        for stage in stages[1:]:
            if ("prepared", key) not in stage.cache:
                stage.cache["prepared", key] = self.lift.emit(
                    lambda x, m: m.pick(x.unsqueeze(-1)).squeeze(-1), node, stage.map
                )
            node = stage.cache["prepared", key]
        return node

    def _prepare(self, first: Attention, method: Reduction, place: Place, root: Stage, span: Span | None) -> fx.Node:
        assert first.join is not None
        value = self.lift.env[residual_of(first.join)]  # type: ignore[index]
        while value.before_cut is not None:
            value = value.before_cut
        tensors: dict[str, Any] = {"hidden": value.node} | self.visibility(first, {})
        head, tail, count = place.head, place.tail, None
        tensors["spans"] = self.labels.of(first, method, root)
        if span is not None and span.mask is not None:
            inside = self.labels.inside(span, None, whole=method.merges == "visual")
            tensors["inside"], count = inside, span.count
        whole: dict[str, Any] = {
            "head": head,
            "tail": tail,
            "span": count,
            "whole": count,
            "tokens": root.length,
            "layer": 0,
        }
        swap = first.token_dim < first.batch_dim

        def function(inputs: dict[str, Any]) -> torch.Tensor:
            seen: dict[str, Any] = tree_map(torch.Tensor.detach, inputs)
            hidden = seen["hidden"].transpose(0, 1) if swap else seen["hidden"]
            return method.prepare(Site(**whole, depth=place.depth, **(seen | {"hidden": hidden})))

        node: fx.Node = self.lift.emit(function, tensors)
        return node


def tower_of(tower: Encoder | None, tensors: dict[str, Any]) -> Tower:
    """What a method sees of a vision encoder, from the values of the nodes that `SiteTensors.of` found."""
    assert tower is not None
    steps = list(zip(tower.projector, tensors["projector"], strict=True))

    def project(rows: Tensor) -> Tensor:
        for node, beside in steps:
            parameters = (parameter.to(rows.dtype) for parameter in beside)
            values = dict(zip(node.all_input_nodes, (rows, *parameters), strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            rows = node.target(*args, **kwargs)  # type: ignore[operator]
        return rows

    patches = shape_of(tower.stream)[1] - tower.first
    return Tower(**{name: x for name, x in tensors.items() if name != "projector"}, patches=patches, project=project)


def number(scale: Any) -> Any:
    """The factor on q k^T: a number, or the fake value of the node that computes it."""
    return scale.meta["val"] if isinstance(scale, fx.Node) else scale


def rows_at(value: Any, token_dim: int) -> Rows | None:
    """The stage of a value's token axis, None where no token map has met it."""
    factors = value.layout.get(token_dim, ())
    return factors[0] if len(factors) == 1 and isinstance(factors[0], Rows) else None


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a captured tensor."""
    return tuple(node.meta["val"].shape)


def _is_of_samples(block: Attention, rows: Any) -> bool:
    """Whether a mask with so many rows is made for these samples, and hides what is padding in each; be it only one."""
    if block.join is None or block.mask is None or not (isinstance(rows, int) and rows == 1):
        return True
    return same(shape_of(block.join)[block.batch_dim], 1) and not only_parameters(block.mask)


def visible(mask: torch.Tensor) -> torch.Tensor:
    """[B N] whether any query of any head may see the key."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.any(-2).any(1)
