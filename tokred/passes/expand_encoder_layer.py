"""`nn.TransformerEncoder`'s fast path runs a whole layer as one opaque op: spell it out, so that its blocks show."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tokred.compiler.capture import trace_into
from tokred.compiler.graphs import as_module
from tokred.compiler.relations import Op

__all__ = ["expand_encoder_layer"]

FUSED = torch.ops.aten._transformer_encoder_layer_fwd.default


def expand_encoder_layer(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace each fused encoder layer by the ops that it stands for. Returns `gm` itself if there are none."""
    fused = gm.graph.find_nodes(op="call_function", target=FUSED)
    if not fused:
        return gm
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node.target is not FUSED:
            env[node] = graph.node_copy(node, env.__getitem__)
            continue
        before = set(graph.nodes)
        arguments = fx.map_arg(Op(node).arguments, env.__getitem__)
        env[node] = trace_into(graph, _layer, (arguments,))
        for made in graph.nodes:
            if made not in before:
                made.meta.update({k: node.meta[k] for k in ("stack_trace", "nn_module_stack") if k in node.meta})
    graph.lint()
    return as_module(gm, graph)


def _layer(a: dict[str, Any]) -> Tensor:
    """nn.TransformerEncoderLayer in inference (no dropout), from the arguments of the fused op."""
    x: Tensor = a["src"]
    width = x.shape[-1]

    def norm(x: Tensor, which: int) -> Tensor:
        return F.layer_norm(x, (width,), a[f"norm_weight_{which}"], a[f"norm_bias_{which}"], a["eps"])

    def attend(x: Tensor) -> Tensor:
        q, k, v = (
            F.linear(x, a["qkv_weight"], a["qkv_bias"])
            .unflatten(-1, (3, a["num_heads"], -1))
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        out = F.scaled_dot_product_attention(q, k, v, _visible(a["mask"], a["mask_type"]))  # [B H N D]
        return F.linear(out.transpose(1, 2).flatten(2), a["proj_weight"], a["proj_bias"])

    def feed(x: Tensor) -> Tensor:
        hidden = F.linear(x, a["ffn_weight_1"], a["ffn_bias_1"])
        return F.linear(F.gelu(hidden) if a["use_gelu"] else F.relu(hidden), a["ffn_weight_2"], a["ffn_bias_2"])

    if a["norm_first"]:
        x = x + attend(norm(x, 1))
        return x + feed(norm(x, 2))
    x = norm(x + attend(x), 1)
    return norm(x + feed(x), 2)


def _visible(mask: Tensor | None, kind: int | None) -> Tensor | None:
    """The fused mask is true (or -inf) where a key is hidden: [N N] (kind 0), [B N] (kind 1), [B H N N] (kind 2)."""
    if mask is None:
        return None
    visible = ~mask.to(torch.bool)
    return visible[:, None, None, :] if kind == 1 else visible
