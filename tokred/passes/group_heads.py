"""SDPA whose key and value heads were copied for groups of query heads: give it the heads themselves and `enable_gqa`.

On the CPU this is faster by a fifth to three quarters (benchmarks: 2 cores, float32, torch 2.13; eager and Inductor
alike). On CUDA only the flash kernel knows groups, and it takes no mask: with a mask the copies stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokred.compiler.capture import module_path, source_line, tensor_meta, trace_into
from tokred.compiler.relations import Op
from tokred.passes.graph_edit import inherit
from tokred.passes.indices import Layout, arrange, flat, fresh, leaves, resolve
from tokred.passes.match_attention import Surroundings
from tokred.passes.operands import Operand, climb

__all__ = ["group_heads"]

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def group_heads(graph: fx.Graph, lines: list[str]) -> list[fx.Node]:
    """Rewrite in place; returns the SDPA nodes that changed, and adds a line for each."""
    around = Surroundings(graph)
    changed = []
    for node in list(graph.nodes):
        if node.target is SDPA and (groups := _ungroup(graph, node, around)) is not None:
            changed.append(node)
            where = module_path(node) or "attention"
            lines.append(
                f"{where} ({source_line(node)}): {node.name}, {groups} query heads share a key head: enable_gqa"
            )
    return changed


def _ungroup(graph: fx.Graph, node: fx.Node, around: Surroundings) -> Any | None:
    """The size of the groups, or None where heads are not copies."""
    op = Op(node)
    metas = [tensor_meta(op[name]) for name in ("query", "key", "value")]
    if op["enable_gqa"] or any(meta is None or meta.dim() != 4 for meta in metas):
        return None
    query, key, value = metas
    assert query is not None and key is not None and value is not None
    if query.device.type != "cpu" and op["attn_mask"] is not None:
        return None
    if not key.shape[1] == value.shape[1] == query.shape[1]:
        return None
    batch, heads, keys = fresh(key.shape[:3])
    layouts: list[Layout] = [(batch, heads, keys, *fresh(x.shape[3:])) for x in (key, value)]
    region = around.region[node]
    sources = [
        climb(op[name], layout, x.dtype, lambda n: around.region[n] == region, scaled=False)
        for name, layout, x in zip(("key", "value"), layouts, (key, value), strict=True)
    ]
    if sources[0] is None or sources[1] is None:
        return None
    return _use_stored(
        graph, node, [(s, lay) for s, lay in zip(sources, layouts, strict=True) if s is not None], leaves(heads)
    )


def _use_stored(graph: fx.Graph, node: fx.Node, operands: list[tuple[Operand, Layout]], heads: Any) -> Any | None:
    """Replace key and value by the highest tensors that still hold all heads once."""
    stored = [_highest(operand, heads) for operand, _ in operands]
    if stored[0] is None or stored[1] is None or stored[0][2] != stored[1][2]:
        return None
    copies = stored[0][2]
    fewer = heads[: len(heads) - copies]
    groups: Any = 1
    for index in heads[len(heads) - copies :]:
        groups = groups * index.size
    before = set(graph.nodes)
    with graph.inserting_before(node):
        new = []
        for found, (_, layout) in zip(stored, operands, strict=True):
            assert found is not None
            source, own = found[0], found[1]
            target = resolve((layout[0], fewer, *layout[2:]))
            new.append(trace_into(graph, lambda x, own=own, target=target: arrange(x, own, target), (source,)))
    inherit([n for n in graph.nodes if n not in before], node)
    node.args = (node.args[0], *new, *node.args[3:])
    node.kwargs = {**node.kwargs, "enable_gqa": True}
    return groups


def _highest(operand: Operand, heads: Any) -> tuple[fx.Node, Layout, int] | None:
    """The tensor farthest up that lacks nothing but the innermost indices of the heads, and how many it lacks."""
    whole = set(flat(operand.above[0][1]))
    for node, layout, _ in reversed(operand.above):
        lacks = whole - set(flat(layout))
        if lacks and lacks == set(heads[len(heads) - len(lacks) :]):
            return node, layout, len(lacks)
    return None
