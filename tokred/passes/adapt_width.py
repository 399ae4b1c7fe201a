"""In the place of each MLP that the recipe names put imported learners, of which a gate says how many a token gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from tokred.compiler.blocks import Attention, Blocks, Mlp
from tokred.compiler.capture import tensor_meta
from tokred.compiler.record import record
from tokred.compiler.report import Refusal
from tokred.errors import in_a_line
from tokred.passes.graph_edit import copy_graph, inherit, keep_output_strides, refresh
from tokred.passes.indices import same_shape
from tokred.registry.sparsify.adaptive_width import AdaptiveWidth

__all__ = ["Adapted", "adapt_width"]


@dataclass
class Adapted:
    """The rewritten graph; which method replaced which MLP, in words, and why not others."""

    graph: fx.GraphModule
    applied: dict[Mlp | Attention, tuple[AdaptiveWidth, str]] = field(default_factory=dict)
    refused: dict[Mlp | Attention, tuple[AdaptiveWidth, Refusal]] = field(default_factory=dict)


def adapt_width(gm: fx.GraphModule, blocks: Blocks, methods: Sequence[AdaptiveWidth]) -> Adapted:
    """Replace the MLPs that the methods name; the first one that acts on a block has it. `blocks` are those of `gm`."""
    done = Adapted(gm)
    copy = copy_graph(gm)
    copies = dict(zip(gm.graph.nodes, copy.graph.nodes, strict=True))
    changed: list[fx.Node] = []
    for mlp in blocks.mlps:
        depth = 1 + max(other.layer for other in blocks.mlps if other.axis == mlp.axis)
        method = next((method for method in methods if method.acts_on(mlp.layer, depth, mlp.module)), None)
        if method is None:
            continue
        where = f"{mlp.module} ({mlp.source})" if mlp.module else mlp.source
        if reason := _unfit(mlp):
            done.refused[mlp] = (method, Refusal("layout", reason, where))
            continue
        try:
            node, words = _replace(copy.graph, copies[mlp.inputs[0].input], copies[mlp.down], method, mlp.layer)
        except Exception as error:
            reason = f"{method.name}: {in_a_line(error)}"
            done.refused[mlp] = (method, Refusal("method-raised", reason, where))
            continue
        changed.append(node)
        done.applied[mlp] = (method, words)
    if changed:
        refresh(copy.graph, changed)
        keep_output_strides(copy, gm)
        copy.graph.eliminate_dead_code()
        copy.recompile()
        done.graph = copy
    return done


def _unfit(mlp: Mlp) -> str:
    """Why nothing can stand in an MLP's place, as a sentence; "" if something can."""
    linears = (*mlp.inputs, *mlp.outputs)
    if not mlp.inputs or not mlp.outputs or any(linear.channel != -1 for linear in linears):
        return "the MLP is written as convolutions or as routed experts: its rows are no tokens of their own"
    reads = {linear.input for linear in mlp.inputs}
    before, after = tensor_meta(mlp.inputs[0].input), tensor_meta(mlp.down)
    if len(reads) > 1 or before is None or after is None or not same_shape(before.shape, after.shape):
        return "what the MLP gives has another shape than what it reads"
    return ""


def _replace(graph: fx.Graph, x: fx.Node, down: fx.Node, method: AdaptiveWidth, layer: int) -> tuple[fx.Node, str]:
    """Let readers of `down` read what the learners make of `x`; returns that, and what is done in words."""
    like, before = x.meta["val"], set(graph.nodes)
    learners = method.at(layer, like)
    masked = torch.is_grad_enabled() or like.device.type != "cpu"
    options: dict[str, Any] = {
        "activation": method.activation,
        "gate_activation": method.gate_activation,
        "masked": masked,
    }
    with graph.inserting_before(down):
        new: Any = record(graph, partial(learners.compute, **options), (x,))
        if new.meta["val"].dtype != down.meta["val"].dtype:
            new = record(graph, partial(torch.Tensor.to, dtype=down.meta["val"].dtype), (new,))
    inherit([node for node in graph.nodes if node not in before], down)
    down.replace_all_uses_with(new)
    words = f"0 to {len(learners.up)} learners of {learners.up.shape[1]} neurons a token"
    return new, f"{words}, all computed and masked: no faster" if masked else words
