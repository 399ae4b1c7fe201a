"""Make every spelling of `softmax(q k^T * scale + mask) v` one `scaled_dot_product_attention`: fused kernels apply."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokred.compiler.capture import module_path, source_line, tensor_meta, trace_into
from tokred.compiler.relations import same
from tokred.compiler.report import Refusal
from tokred.passes.constants import constant_tensor, magnitude
from tokred.passes.graph_edit import copy_graph, erase_unused, inherit, keep_output_strides, refresh
from tokred.passes.group_heads import group_heads
from tokred.passes.indices import (
    Dim,
    Layout,
    arrange,
    expanded,
    flat,
    leaves,
    reshaped,
    resolve,
    same_shape,
    size_of,
    spread,
)
from tokred.passes.match_attention import SOFTMAX, Match, Surroundings, match_attention
from tokred.passes.scores import Filled

__all__ = ["canonical_attention"]

aten = torch.ops.aten
log = logging.getLogger("tokred")

SDPA = aten.scaled_dot_product_attention.default


def canonical_attention(gm: fx.GraphModule, lines: list[str]) -> fx.GraphModule:
    """Rewrite every attention of a captured graph to SDPA, and key and value heads that were copied for groups of query
    heads to `enable_gqa`. Exact up to rounding. Returns `gm` itself where there is nothing to do; one line per rewrite.
    """
    if not any(node.target in SOFTMAX or node.target is SDPA for node in gm.graph.nodes):
        return gm
    new = copy_graph(gm)
    graph = new.graph
    unused = {node for node in graph.nodes if not node.users}
    matches = list(_matches(graph))
    replaced: dict[fx.Node, fx.Node] = {}
    for match in matches:
        replaced[match.product] = _replace(graph, match, replaced)
        lines.append(_line(match, replaced[match.product]))
    grouped = group_heads(graph, lines)
    if not matches and not grouped:
        return gm
    erase_unused(graph, unused)
    refresh(graph, replaced.values())
    keep_output_strides(new, gm)
    graph.lint()
    new.recompile()
    return new


def _matches(graph: fx.Graph) -> Iterable[Match]:
    around = Surroundings(graph)
    for node in graph.nodes:
        if node.target not in SOFTMAX:
            continue
        found = match_attention(node, around)
        if isinstance(found, Match) and found.dropout > 0.0:
            found = Refusal("dropout", "attention weights are dropped in training", source_line(node))
        if isinstance(found, Match):
            yield found
        else:
            log.info("not made SDPA [%s]: %s, at %s", found.code, found.reason, found.where)


def _line(match: Match, new: fx.Node) -> str:
    meta = tensor_meta(match.query.node)
    where = module_path(match.softmax) or "attention"
    masks = f", {len(match.terms)} mask(s)" if match.terms else ""
    shape = list(meta.shape) if meta is not None else "?"
    what = f"softmax(q k^T) v -> {new.name}, q {shape}, scale {match.scale:.6g}{masks}"
    return f"{where} ({source_line(match.softmax)}): {what}"


def _replace(graph: fx.Graph, match: Match, replaced: dict[fx.Node, fx.Node]) -> fx.Node:
    """Trace the SDPA form in front of the last product and use it instead."""
    plan = _plan(match)
    operands = [
        match.query.nearest(plan.query),
        match.key.nearest(plan.key),
        match.value.nearest(plan.value),
    ]
    masks = [term.condition if isinstance(term, Filled) else term.mask for term in match.terms]
    may_die = [_may_hide_rows(term) for term in match.terms]
    layouts = [operand[1] for operand in operands]

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
        q = _whole(arrange(q, layouts[0], plan.query), plan.query)
        k = _whole(arrange(k, layouts[1], plan.key), plan.key)
        v = _whole(arrange(v, layouts[2], plan.value), plan.value)
        return arrange(_attend(match, plan, q, k, v, masks, may_die), plan.out, match.out)

    with graph.inserting_before(match.product):
        nodes = [replaced.get(node, node) for node in [operand[0] for operand in operands] + masks]
        before = set(graph.nodes)
        new: fx.Node = trace_into(graph, attention, (*nodes[:3], nodes[3:]))
    inherit([node for node in graph.nodes if node not in before], match.softmax)
    old, now = match.product.meta["val"], new.meta["val"]
    if not same_shape(old.shape, now.shape) or old.dtype != now.dtype or old.device != now.device:
        raise ValueError(
            f"{match.product.name} is {old.dtype} {list(old.shape)}, its SDPA form {now.dtype} {list(now.shape)}"
        )
    match.product.replace_all_uses_with(new)
    return new


# -- the layout in which SDPA runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Four dimensions each: [B H N D], [B H M D], [B H M E], [B H N E]; grouped keys have fewer heads."""

    query: Layout
    key: Layout
    value: Layout
    out: Layout
    mask: Layout  # [B H N M]
    grouped: bool


def _plan(match: Match) -> _Plan:
    """Of all ways to cut the batch indices into samples and heads the one that copies no mask, and then no query."""
    batch = leaves(match.batch)
    copies = _copies(match, batch)
    latest = len(batch) - max(copies, 1)
    latest = max(
        latest - 1 if copies else latest, min(len(batch), 1)
    )  # heads that share a key stay beside those that do not
    present = {index for term in match.terms for index in flat(term.layout)}

    def cost(plan: _Plan) -> tuple[bool, int]:
        mixed = any(0 < len(present & set(part)) < len(part) for part in plan.query[:2])
        return mixed, match.query.work(plan.query)

    plans = [_cut(match, batch, start, copies) for start in range(latest, 0, -1) or [0]]
    return min(plans, key=cost)


def _copies(match: Match, batch: Dim) -> int:
    """How many of the innermost batch indices neither keys nor values have: groups of queries share their heads."""
    if match.product.meta["val"].device.type != "cpu" and match.terms:
        return 0  # only CUDA's flash kernel has groups, and it takes no mask: SDPA would fall back to plain maths
    stored = set(flat(match.key.highest)) | set(flat(match.value.highest))
    copies = 0
    while copies < len(batch) and batch[len(batch) - 1 - copies] not in stored:
        copies += 1
    return copies


def _cut(match: Match, batch: Dim, start: int, copies: int) -> _Plan:
    rows, keys = leaves(match.rows), leaves(match.keys)
    depth, features = leaves(match.depth), leaves(match.features)
    outer, heads = batch[:start], batch[start:]
    copies = min(copies, len(heads))
    fewer = heads[: len(heads) - copies]
    return _Plan(
        query=(outer, heads, rows, depth),
        key=(outer, fewer, keys, depth),
        value=(outer, fewer, keys, features),
        out=(outer, heads, rows, features),
        mask=(outer, heads, rows, keys),
        grouped=copies > 0,
    )


# -- tensor code: traced into the graph --------------------------------------------------------------------------------


def _attend(
    match: Match,
    plan: _Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    masks: list[torch.Tensor],
    may_die: list[bool],
) -> torch.Tensor:
    keep, bias = _masks(match, plan, masks, q)
    mask, dead = keep if bias is None else bias, None
    if keep is not None and bias is not None:
        mask = bias.masked_fill(~keep, -math.inf)
    if mask is not None and any(may_die):
        dead = ~mask.any(-1, keepdim=True) if mask.dtype == torch.bool else (mask == -math.inf).all(-1, keepdim=True)
    fills = [term.value for term in match.terms if isinstance(term, Filled)]
    uniform = dead is not None and bool(fills) and all(map(math.isfinite, fills))
    if uniform:
        # A row of nothing but one finite value is uniform: so is a row whose query is zero and that sees all.
        assert dead is not None and mask is not None
        q, mask = q.masked_fill(dead, 0.0), mask | dead if mask.dtype == torch.bool else mask.masked_fill(dead, 0.0)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=match.scale, enable_gqa=plan.grouped
    )
    if dead is not None and not uniform and match.softmax.target is not aten._safe_softmax.default:
        out = out.masked_fill(dead, math.nan)  # 0 in SDPA; softmax of nothing but -inf is NaN
    return out


def _masks(
    match: Match, plan: _Plan, tensors: list[torch.Tensor], q: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """All fills as one mask of what may be seen, all additive masks as one sum; both [B|1 H|1 N|1 M]."""
    order = tuple(index for dim in plan.mask for index in dim)
    keep: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    for term, tensor in zip(match.terms, tensors, strict=True):
        layout = resolve(term.layout)
        mask = spread(tensor, layout, order)
        if isinstance(term, Filled):
            mask = mask if term.inverted else ~mask
            keep = mask if keep is None else keep & mask
            continue
        if mask.dtype != q.dtype and torch.promote_types(mask.dtype, q.dtype) == q.dtype:
            mask = mask.to(q.dtype)
        mask = mask if term.factor == 1.0 else mask * term.factor
        bias = mask if bias is None else bias + mask
    return _merged(keep, plan.mask), _merged(bias, plan.mask)


def _merged(mask: torch.Tensor | None, target: Layout) -> torch.Tensor | None:
    """From one dimension an index to four: [B H N M], of size one where the mask does not depend on it (but not M)."""
    if mask is None:
        return None
    sizes, shape, place = list(mask.shape), [], 0
    for d, dim in enumerate(target):
        own = sizes[place : place + len(dim)]
        absent = d < 3 and all(isinstance(size, int) and size == 1 for size in own)
        if not absent:
            sizes[place : place + len(dim)] = [index.size for index in dim]
        place += len(dim)
        shape.append(1 if absent else size_of(dim))
    return reshaped(expanded(mask, sizes), shape)


def _whole(x: torch.Tensor, target: Layout) -> torch.Tensor:
    """Copies (as a view) along whole dimensions that `x` lacks."""
    sizes = [size_of(dim) if same(have, 1) else have for have, dim in zip(x.shape, target, strict=True)]
    return expanded(x, sizes)


def _may_hide_rows(term: Any) -> bool:
    """Whether some row may be hidden from all keys; the mask's values decide where they are known."""
    if not isinstance(term, Filled):
        return math.isinf(magnitude(term.mask))
    hidden = constant_tensor(term.condition)
    if hidden is None or hidden.dim() == 0:
        return True
    hidden = ~hidden if term.inverted else hidden
    return bool(hidden.all(-1).any())
