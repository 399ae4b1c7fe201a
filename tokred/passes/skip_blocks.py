"""Leave out the MLPs and attentions that a recipe names: the sum that joins one to the stream becomes the stream.

What is computed of the block alone, up to that sum, goes with it: a norm behind it, a scale, dropout.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from tokred.compiler.blocks import Attention, Blocks, Mlp
from tokred.compiler.capture import is_parameter, tensor_meta
from tokred.compiler.graphs import PRODUCTS, reaches
from tokred.compiler.neurons import find_experts
from tokred.compiler.report import Refusal
from tokred.compiler.residual import residual_of
from tokred.errors import ArgumentError
from tokred.passes.graph_edit import copy_graph, inherit, keep_output_strides, refresh
from tokred.passes.indices import same_shape
from tokred.registry.skip import Skip

__all__ = ["Skipped", "skip_blocks"]

aten = torch.ops.aten

Block = Mlp | Attention


@dataclass
class Skipped:
    """The graph without some of its blocks; which method left out which, in words, and why not others.

    left   the model's blocks, as the user wrote them, that the graph still has
    """

    graph: fx.GraphModule
    left: Blocks
    applied: dict[Block, tuple[Skip, str]] = field(default_factory=dict)
    refused: dict[Block, tuple[Skip, Refusal]] = field(default_factory=dict)


def skip_blocks(gm: fx.GraphModule, blocks: Blocks, original: Blocks, methods: tuple[Skip, ...]) -> Skipped:
    """Leave out what the methods name. `blocks` are those of `gm`, `original` the model's as the user wrote it."""
    done = Skipped(gm, original)
    if len(blocks.mlps) != len(original.mlps) or len(blocks.attentions) != len(original.attentions):
        return done
    copy = copy_graph(gm)
    copies = dict(zip(gm.graph.nodes, copy.graph.nodes, strict=True))
    fixed, changed = _fixed(copy), []
    paired = zip(blocks.attentions, original.attentions, strict=True)
    alone = {block: _own_attention(was, original) for block, was in paired}
    found: list[Block] = [*blocks.mlps, *blocks.attentions]
    found += [mlp for mlp in find_experts(gm, blocks) if mlp not in found]
    for block in found:
        kind = "mlp" if isinstance(block, Mlp) else "attention"
        where = f"{block.module} ({block.source})" if block.module else block.source
        for method in methods:
            try:
                if block in done.applied or not method.skips(kind, block.layer, block.depth, block.module):
                    continue
            except ArgumentError as error:
                done.refused.setdefault(block, (method, Refusal("method-raised", str(error), where)))
                continue
            if isinstance(block, Attention) and not alone[block]:
                reason = "its layer has another attention, and which is which does not show in every graph"
                done.refused.setdefault(block, (method, Refusal("cross-attention", reason, where)))
                continue
            join = None if block.form == "experts" else _join(copies[_given(block)], fixed)
            if join is None:
                reason = "what it gives is not just added to the stream that it reads"
                done.refused.setdefault(block, (method, Refusal("no-residual", reason, where)))
                continue
            changed.append(_leave_out(copy.graph, *join))
            done.applied[block] = (method, "left out: its sum with the stream is the stream")
    for block in done.applied:
        done.refused.pop(block, None)
    if done.applied:
        refresh(copy.graph, changed)
        keep_output_strides(copy, gm)
        copy.recompile()
        done.graph = copy
        attentions = zip(blocks.attentions, original.attentions, strict=True)
        mlps = zip(blocks.mlps, original.mlps, strict=True)
        done.left = Blocks(
            [was for block, was in attentions if block not in done.applied],
            [was for mlp, was in mlps if mlp not in done.applied],
        )
    return done


def _own_attention(block: Attention, original: Blocks) -> bool:
    """Whether its stream has as many attentions as MLPs."""
    attentions = sum(other.axis == block.axis for other in original.attentions)
    return attentions == sum(mlp.axis == block.axis for mlp in original.mlps)


def _given(block: Block) -> fx.Node:
    """What a block gives first that nothing else is in; of a softmax, its product with the values."""
    if isinstance(block, Mlp):
        return block.down
    products = [user for user in block.value.users if user.target in PRODUCTS and reaches(block.anchor, user)]
    return products[0] if products else block.anchor


def _fixed(gm: fx.GraphModule) -> set[fx.Node]:
    """Numbers, and what is computed from parameters alone."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        number = isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat))
        computed = node.op == "call_function" and all(source in found for source in node.all_input_nodes)
        if number or is_parameter(node) or computed:
            found.add(node)
    return found


def _join(start: fx.Node, fixed: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """The one sum of something else with what is made of `start` alone, and that something; None if there is no such,
    or if it is no part of a residual join with what `start` was computed from."""
    made, ends = {start}, set()
    node = start.next
    while node.op != "root":
        sources = [source for source in node.all_input_nodes if source not in fixed]
        if any(source in made for source in sources):
            if node.op != "output" and all(source in made for source in sources):
                made.add(node)
            else:
                ends.add(node)
        node = node.next
    total = ends.pop() if len(ends) == 1 else start
    if total.target is not aten.add.Tensor or total.kwargs.get("alpha", 1) != 1:
        return None
    others = [arg for arg in total.args if isinstance(arg, fx.Node) and arg not in made]
    was, other = tensor_meta(total), tensor_meta(others[0]) if others else None
    if was is None or other is None or was.dtype != other.dtype or not same_shape(was.shape, other.shape):
        return None
    return (total, others[0]) if _residual(total, start) else None


def _residual(total: fx.Node, start: fx.Node) -> bool:
    """Whether a sum, or one that it is a part of (attention beside MLP), is a residual join around `start`."""
    node: fx.Node | None = total
    while node is not None:
        stream = residual_of(node)
        if stream is not None:
            return reaches(stream, start)
        more = [user for user in node.users if user.target is aten.add.Tensor]
        node = more[0] if len(node.users) == len(more) == 1 else None
    return False


def _leave_out(graph: fx.Graph, total: fx.Node, other: fx.Node) -> fx.Node:
    """Put a sum's other operand in its place; what that leaves without users goes."""
    new = other
    if any(user.op == "output" for user in total.users):  # the caller gets a tensor of its own
        with graph.inserting_before(total):
            new = graph.call_function(aten.clone.default, (other,))
        new.meta["val"] = other.meta["val"]
        inherit([new], total)
    total.replace_all_uses_with(new)
    graph.eliminate_dead_code()
    return new
