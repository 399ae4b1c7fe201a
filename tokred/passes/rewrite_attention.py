"""At each attention that the recipe names compute it as the method does. Nothing around it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

from tokred.compiler.blocks import Attention
from tokred.compiler.capture import tensor_meta
from tokred.compiler.causal import hides_earlier_keys, is_causal
from tokred.compiler.record import record
from tokred.compiler.relations import Op, same
from tokred.compiler.report import Refusal
from tokred.errors import in_a_line
from tokred.passes.graph_edit import copy_graph, inherit, keep_output_strides, refresh
from tokred.passes.indices import same_shape
from tokred.passes.outcome import Outcome
from tokred.passes.sites import refuse
from tokred.registry.attention import AttentionRewrite

__all__ = ["Rewritten", "rewrite_attention"]

SDPA = torch.ops.aten.scaled_dot_product_attention.default

Gate = Callable[[Attention, AttentionRewrite, fx.Node], tuple[str, Refusal | None]]


Rewritten = Outcome[Attention, AttentionRewrite]  # the words are a prediction


def rewrite_attention(
    gm: fx.GraphModule, anchors: Mapping[Attention, fx.Node], methods: tuple[AttentionRewrite, ...], *, gate: Gate
) -> Rewritten:
    """Replace the attentions that the methods name; the first one that acts on an attention computes it.

    anchors   the node of `gm` that computes each block's attention, after tokens were reduced
    """
    done = Rewritten(gm)
    for block, node in anchors.items():
        for method in methods:
            if block in done.applied or method.shortest is None:
                continue
            if not method.acts_on(block.layer, block.depth, block.module):
                continue
            if block.refusal is not None and block.refusal.code == "dead-tokens":
                continue  # a row or two: cheap as it is, and exact
            note, refusal = "", _unfit(block, method, node)
            if refusal is None:
                note, refusal = gate(block, method, node)
            if refusal is None:
                done.applied[block] = (method, note)
            else:
                done.refused.setdefault(block, (method, refusal))
    if done.applied:
        _replace_all(done, gm, anchors)
    return done


def _replace_all(done: Rewritten, gm: fx.GraphModule, anchors: Mapping[Attention, fx.Node]) -> None:
    """Write what was decided into a copy of the graph; a method that raises is refused there."""
    copy = copy_graph(gm)
    copies = dict(zip(gm.graph.nodes, copy.graph.nodes, strict=True))
    changed = []
    for block, (method, _) in list(done.applied.items()):
        try:
            changed.append(_replace(copy.graph, copies[anchors[block]], method))
        except Exception as error:
            reason = f"{method.name}: {in_a_line(error)}"
            done.refused[block] = (method, refuse("method-raised", reason, block))
            del done.applied[block]
    if changed:
        refresh(copy.graph, changed)
        keep_output_strides(copy, gm)
        copy.graph.eliminate_dead_code()
        copy.recompile()
        done.graph = copy


def _unfit(block: Attention, method: AttentionRewrite, node: fx.Node) -> Refusal | None:
    """Why this attention cannot be computed so; None if it can. Masks that hide more may show only when it runs."""
    if block.form != "self":
        return block.refusal or refuse(block.form, f"{method.name} computes self-attention, and this is none", block)
    if node.target is not SDPA:
        return refuse("no-sdpa", "the attention is not one call of SDPA, and no exact pass made it one", block)
    op = Op(node)
    metas = [tensor_meta(op[name]) for name in ("query", "key", "value")]
    if any(meta is None or meta.dim() != 4 for meta in metas):
        return refuse("layout", "queries, keys and values are not samples, heads, tokens, channels", block)
    query, key, value = (meta.shape for meta in metas if meta is not None)
    if not (same(query[0], key[0]) and same(key[0], value[0]) and same_shape(key[1:3], value[1:3])):
        return refuse("layout", "queries, keys and values have different samples or heads", block)
    if op["dropout_p"]:
        return refuse("dropout", "the attention drops weights at random, as in training", block)
    if not is_causal(block):
        reason = "the last queries stand for the others only where later tokens are hidden, and here they are seen"
        return refuse("not-causal", reason, block)
    if not op["is_causal"] and hides_earlier_keys(block):
        return refuse("windowed", "its mask hides earlier tokens as well, or weighs them", block)
    if isinstance(query[2], int) and method.shortest is not None and query[2] < method.shortest:
        reason = f"{query[2]} tokens: {method.name} leaves nothing out of fewer than {method.shortest}"
        return refuse("too-short", reason, block)
    return None


def _replace(graph: fx.Graph, node: fx.Node, method: AttentionRewrite) -> fx.Node:
    """Compute `node` by the method; returns what replaces it."""
    op, before = Op(node), set(graph.nodes)
    meta = tensor_meta(node)
    tensors: tuple[Any, ...] = tuple(op[name] for name in ("query", "key", "value", "attn_mask"))
    scale = op["scale"].meta["val"] if isinstance(op["scale"], fx.Node) else op["scale"]

    with graph.inserting_before(node):
        new = record(graph, partial(method.attend, scale=scale), tensors)
    now = tensor_meta(new) if isinstance(new, fx.Node) else None
    if now is None:
        raise TypeError(f"attend() returned {type(new).__name__}, not a tensor")
    assert meta is not None
    if not same_shape(now.shape, meta.shape) or now.dtype != meta.dtype:
        shown = f"attend() gives {list(now.shape)} {now.dtype}, the attention {list(meta.shape)} {meta.dtype}"
        raise ValueError(shown)
    inherit([n for n in graph.nodes if n not in before], node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    replacement: fx.Node = new
    return replacement
