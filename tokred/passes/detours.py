"""Tokens that go around a layer: out of the stream where it begins, back in, weighed, where it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from tokred.compiler.align import Value
from tokred.compiler.attention import Attention
from tokred.compiler.lift import Lift
from tokred.compiler.staging import Stage
from tokred.passes.site_tensors import rows_at
from tokred.registry.maps import TokenMap

__all__ = ["Detour", "Detours"]


@dataclass
class Detour:
    """What goes around a layer: the stream that entered it, and the nodes of the token map and of [B N] weights."""

    block: Attention
    entered: Value
    stage: Stage
    token_map: Any
    weight: fx.Node


class Detours:
    """The layers of a graph that some tokens go around."""

    def __init__(self, lift: Lift):
        self.lift = lift
        self._by_end: dict[fx.Node, Detour] = {}

    def open(self, end: fx.Node, detour: Detour) -> None:
        """The tokens are back in the value of `end`."""
        self._by_end[end] = detour

    def visit(self, node: fx.Node) -> None:
        """Run a node; where a layer ends that tokens went around, they are back in its value."""
        detour = self._by_end.get(node)
        if detour is None:
            self.lift.visit(node)
            return
        block, entered, stage = detour.block, detour.entered, detour.stage
        swap = block.token_dim < block.batch_dim

        def factor(weight: Tensor, like: Tensor) -> Tensor:  # [B N] as [B N 1] or [N B 1]
            return (weight.t() if swap else weight).unsqueeze(-1).to(like.dtype)

        added = next(arg for arg in node.all_input_nodes if arg is not block.join)
        branch = self.lift.env[added]
        rows = rows_at(branch, block.token_dim)
        pull = rows is not None and rows.stage is stage
        weighed = self.lift.emit(
            lambda x, m, w: x * factor(m.pull(w) if pull else w, x), branch.node, detour.token_map, detour.weight
        )
        self.lift.redirect[added, node] = Value(weighed, branch.layout, branch.origin)
        self.lift.visit(node)
        left = self.lift.env[node]
        rows = rows_at(left, block.token_dim)
        if rows is None or rows.stage is not stage:
            raise ValueError("tokens are cut inside of a layer that others go around")

        def back(x: Tensor, old: Tensor, m: TokenMap, w: Tensor) -> Tensor:
            old = old * factor(w, old)
            return m.restore(x.transpose(0, 1), old.transpose(0, 1)).transpose(0, 1) if swap else m.restore(x, old)

        whole = self.lift.emit(back, left.node, entered.node, detour.token_map, detour.weight)
        self.lift.env[node] = Value(whole, entered.layout, node)
