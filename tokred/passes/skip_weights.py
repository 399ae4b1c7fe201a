"""Compute linears without reading the weights of what a threshold leaves out: masked products as sparse operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import linear as dense_linear

from tokred.backends.kernels.neurons import gated_tail, sparse_linear
from tokred.compiler.blocks import Mlp
from tokred.compiler.capture import autocasts, tensor_meta
from tokred.compiler.linears import Linear, linear_of
from tokred.compiler.mlp import Gating, Part
from tokred.compiler.neurons import NeuronSite
from tokred.compiler.record import record
from tokred.compiler.relaid import relaid_input, untracked
from tokred.passes.graph_edit import inherit
from tokred.passes.indices import same_shape

__all__ = ["Skipping", "readable"]


def readable(site: NeuronSite, parameters: Mapping[str, Tensor]) -> str:
    """Why the weights at a site cannot be read in part, as half a sentence; "" if they can.

    Of an activated gate it is the last linear's that matters: the one before it is skipped as well where it can be.
    """
    linears = site.block.outputs if isinstance(site.block, Mlp) and site.place.role == "gate" else site.linears
    return next((reason for linear in linears if (reason := _unreadable(linear, parameters))), "")


def _unreadable(linear: Linear, parameters: Mapping[str, Tensor]) -> str:
    values = tensor_meta(linear.input)
    weight = tensor_meta(linear.weight)
    if linear.weight is None or linear.weight.op != "placeholder" or values is None or weight is None:
        return "the weight is no input of the graph"
    if linear.channel != -1:
        return "convolutions have no such operator"
    if autocasts(linear.node):
        return "under autocast a product is computed in another type than its weight's"
    if values.dtype != weight.dtype:
        return f"the weight is {weight.dtype}, what it multiplies {values.dtype}"
    return untracked(parameters[linear.weight.name])


@dataclass
class Skipping:
    """Edits of one graph: `copies` leads from the nodes of the graph that was analysed to those of the one edited."""

    graph: fx.Graph
    copies: Mapping[fx.Node, fx.Node]
    parameters: Mapping[str, Tensor]

    def inputs(self, linears: Iterable[Linear], threshold: float, active: float) -> list[fx.Node]:
        """Replace each linear by one that reads the weights of larger inputs alone; returns the replacements.

        active   the share of inputs that is expected to be larger, for the report
        """

        def product(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
            y: Tensor = sparse_linear(x, weight_t, bias, _limit(x, threshold))
            return y

        return [
            self._replace(linear, product, (self._now(linear), self._columns(linear), self._node(linear.bias)), active)
            for linear in linears
        ]

    def gated(self, site: NeuronSite, threshold: float, active: float, masked: fx.Node | None = None) -> list[fx.Node]:
        """Replace the last linear of a gated MLP, and the one beside its gate, by one that computes open neurons alone.

        masked   what is left of the activated gate, where that was said otherwise than by a threshold

        An empty list says that this cannot be, because the gate's factor or the product is needed elsewhere too (a LoRA
        branch reads or joins it): then mask the gate, and skip what is zero in the last linear.
        """
        gating, down = site.block.gating, site.block.outputs[0]  # type: ignore[union-attr]
        assert gating is not None
        up = linear_of(gating.up.linear)
        if up is None or _unreadable(up, self.parameters) or not _alone(gating, up, down):
            return []
        start, stop = gating.up.start, gating.up.stop
        if gating.gate.linear is gating.up.linear:
            self._gate_alone(gating.gate, up)

        def tail(act: Tensor, x: Tensor, up: Tensor, bias: Tensor | None, down_t: Tensor, down_bias: Any) -> Tensor:
            bias = None if bias is None else bias[start:stop]
            y: Tensor = gated_tail(act, x, up[start:stop], bias, down_t, down_bias, _limit(act, threshold))
            return y

        act = self._node(gating.activated) if masked is None else masked
        operands = (act, self._now(up), self._rows(up), self._node(up.bias))
        return [self._replace(down, tail, (*operands, self._columns(down), self._node(down.bias)), active)]

    def _gate_alone(self, gate: Part, packed: Linear) -> None:
        """Of a linear that makes gate and factor compute the gate."""

        def half(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            bias = None if bias is None else bias[gate.start : gate.stop]
            return dense_linear(x, weight[gate.start : gate.stop], bias)

        old, before = self._node(gate.node), set(self.graph.nodes)
        with self.graph.inserting_before(self._node(packed.node)):
            new = record(self.graph, half, (self._now(packed), self._rows(packed), self._node(packed.bias)))
        inherit([node for node in self.graph.nodes if node not in before], self._node(packed.node))
        old.replace_all_uses_with(new)

    def _replace(self, linear: Linear, function: Any, operands: tuple[Any, ...], active: float) -> fx.Node:
        old, before = self._node(linear.node), set(self.graph.nodes)
        meta = tensor_meta(old)
        assert meta is not None
        with self.graph.inserting_before(old):
            new: fx.Node = record(self.graph, function, operands)
        if not same_shape(new.meta["val"].shape, meta.shape) or new.meta["val"].dtype != meta.dtype:
            raise ValueError(f"{new.target} gives {list(new.meta['val'].shape)}, the linear {list(meta.shape)}")
        inherit([node for node in self.graph.nodes if node not in before], old)
        new.meta["active"] = active
        old.replace_all_uses_with(new)
        return new

    def _node(self, node: Any) -> Any:
        return self.copies[node] if isinstance(node, fx.Node) else node

    def _now(self, linear: Linear) -> fx.Node:
        """What a linear reads by now: a mask may have come before it."""
        place = linear.node.all_input_nodes.index(linear.input)
        return self.copies[linear.node].all_input_nodes[place]

    def _columns(self, linear: Linear) -> fx.Node:
        """The weight as [in out]."""
        weight: fx.Node = self._node(linear.weight)
        return relaid_input(self.graph, weight) if linear.rows else weight

    def _rows(self, linear: Linear) -> fx.Node:
        """The weight as [out in]."""
        weight: fx.Node = self._node(linear.weight)
        return weight if linear.rows else relaid_input(self.graph, weight)


def _limit(values: Tensor, threshold: float) -> Tensor:
    """A threshold as the operators take it."""
    return values.new_full((), threshold, dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)


def _alone(gating: Gating, up: Linear, down: Linear) -> bool:
    """Whether the product of gate and factor goes to the last linear alone, and all of them have the same rows."""
    chain, node = [gating.product], gating.product
    while node is not down.input and len(node.users) == 1:
        node = next(iter(node.users))
        chain.append(node)
    values = [tensor_meta(n) for n in (*chain, gating.activated, up.input, down.node)]
    if node is not down.input or set(node.users) != {down.node} or any(meta is None for meta in values):
        return False
    first = values[0]
    return all(same_shape(v.shape[:-1], first.shape[:-1]) and v.dtype == first.dtype for v in values)  # type: ignore[union-attr]
