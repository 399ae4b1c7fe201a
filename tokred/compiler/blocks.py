"""The attention and MLP blocks of a graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tokred.compiler.attention import Attention, find_attentions
from tokred.compiler.axes import Axes
from tokred.compiler.mlp import Mlp, find_mlps
from tokred.compiler.report import Refusal
from tokred.compiler.residual import joined_to

__all__ = ["Attention", "Blocks", "Mlp", "find_blocks", "renumber"]


@dataclass
class Blocks:
    attentions: list[Attention]
    mlps: list[Mlp]

    def end_of_layer(self, block: Attention) -> fx.Node | None:
        """Where the MLP behind an attention joins the stream; None if no MLP of the layer's own does."""
        end = None if block.join is None else joined_to(block.join)
        return None if end in {other.join for other in self.attentions} else end


def find_blocks(gm: fx.GraphModule, axes: Axes) -> Blocks:
    """All blocks of a captured graph, in the order in which they run."""
    attentions = find_attentions(gm, axes)
    return Blocks(attentions, find_mlps(gm, axes, attentions))


def renumber(blocks: Blocks, original: Blocks) -> Blocks:
    """After a rewrite: the same blocks keep their layer numbers, and one that lost its tokens says so."""
    if len(blocks.mlps) == len(original.mlps):
        for mlp, was in zip(blocks.mlps, original.mlps, strict=True):
            mlp.layer, mlp.depth, mlp.module, mlp.source = was.layer, was.depth, was.module, was.source
    if len(blocks.attentions) != len(original.attentions):
        return blocks
    for block, before in zip(blocks.attentions, original.attentions, strict=True):
        block.layer, block.depth, block.module, block.source = before.layer, before.depth, before.module, before.source
        if block.form == "pool" and before.form != "pool":
            block.form, block.tokens = before.form, 1
            reason = (
                f"only one of its {before.tokens} tokens is read afterwards, and the others are not computed any more"
            )
            block.refusal = Refusal("dead-tokens", reason, block.refusal.where if block.refusal else "")
    return blocks
