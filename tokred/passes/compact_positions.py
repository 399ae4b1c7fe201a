"""Kept tokens take consecutive rows of rotary tables: where that can be, and the proof that it was done."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tokred.compiler.align import Value
from tokred.compiler.attention import Attention
from tokred.compiler.lift import Lift
from tokred.compiler.positions import CODE, Positions
from tokred.compiler.residual import residual_of
from tokred.compiler.staging import Stage, rows_of
from tokred.passes.site_tensors import SiteTensors
from tokred.registry.method import Reduction

__all__ = ["CODE", "CompactPositions"]


class CompactPositions:
    """`positions="compact"` in one attempt at lifting a graph (see tokred/compiler/positions.py)."""

    def __init__(self, gm: fx.GraphModule, attentions: list[Attention], lift: Lift, tensors: SiteTensors):
        self.attentions, self.lift, self.tensors = attentions, lift, tensors
        self.positions = Positions(gm)
        lift.aligner.tables = self.positions.tables

    def why_not(self, block: Attention, method: Reduction) -> str:
        """Why the tokens that a method leaves here cannot be numbered anew; empty where they can."""
        if method.scope == "round_trip":
            return f"{method.name} brings all tokens back behind one attention: their positions stay what they are"
        if method.skips:
            return f"{method.name} brings all tokens back behind one layer: their positions stay what they are"
        first = block.layer if method.scope == "layer" else block.layer + 1
        others = [b for b in self.attentions if (b.axis, b.form) == (block.axis, block.form)]
        return self.positions.fixed([b for b in others if b.layer >= first])

    def assert_consecutive(self, block: Attention, stage: Stage) -> None:
        """The rows that a compact stage takes from rotary tables hold numbers one behind the other, but for padding."""
        node = self.positions.numbers(block)
        if node is None:  # only the last attention's tokens are renumbered, for nobody
            return
        valid = self.tensors.labels.padding(block, stage)
        count, message = stage.length, "tokred: positions='compact' of a prompt whose positions are not 0, 1, 2, ..."

        def check(numbers: Tensor, valid: Tensor | None) -> Tensor:
            late = numbers.reshape(-1, numbers.shape[-1])[:, numbers.shape[-1] - count :]
            fits = late.diff(dim=1) == 1
            fits = fits if valid is None else fits | ~valid[:, 1:] | ~valid[:, :-1]
            torch.ops.aten._assert_async.msg(fits.all(), message)
            return late

        self.tensors.run_ahead(node)
        self.lift.emit(check, self.lift.env[node].node, valid)

    def prove(self) -> None:
        """Raise ValueError unless whatever reads a rotary table behind a compact cut took consecutive rows of it."""
        env, done = self.lift.env, self.lift.aligner.renumbered

        def compact(node: fx.Node) -> bool:
            return any(stage.compact for _, _, rows in rows_of(env[node].layout) for stage in rows.stage.chain)

        wanted = {node for node in self.positions.turned if isinstance(env[node], Value) and compact(node)}
        for block in self.attentions:
            stream = residual_of(block.join) if block.join is not None else None
            if stream is not None and block.refusal is None and compact(stream):
                wanted.update(self.positions.turning(block))
        if wanted - done:
            raise ValueError(f"{min(wanted - done).name} does not take consecutive positions")
