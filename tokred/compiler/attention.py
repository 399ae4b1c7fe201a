"""Attention blocks, found by dataflow from an anchor: no templates, no model names.

An attention is anchored at its softmax (inside SDPA, or between two products), its token axis is the class of its query
rows, its residual stream is the addition that its output ends in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import fx

from tokred.compiler.axes import Axes, Dim
from tokred.compiler.capture import is_parameter, module_path, source_line, tensor_meta
from tokred.compiler.graphs import PRODUCTS, between, projects, reaches, times
from tokred.compiler.relations import Op, same
from tokred.compiler.report import Refusal
from tokred.compiler.residual import residual_of

__all__ = ["Attention", "find_attentions"]

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
NORMS = {aten.layer_norm.default, aten.rms_norm.default, aten.native_layer_norm.default}
WRITES = {aten.index_copy.default, aten.slice_scatter.default, aten.index_put.default}
ELEMENTWISE = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten._to_copy.default,
    aten.dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.detach.default,
    aten.alias.default,
    aten.type_as.default,
    aten.copy.default,
    aten.where.self,
    aten.masked_fill.Scalar,
)


@dataclass(eq=False)
class Attention:
    """One attention block. `refusal` says why its tokens cannot be reduced; the fields below it are then unset."""

    anchor: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: Any
    causal: bool
    form: str  # self, cross, pool, channel
    layer: int = 0
    depth: int = 0
    module: str = ""
    source: str = ""
    tokens: Any = 0
    refusal: Refusal | None = None
    axis: tuple[int, ...] = ()
    join: fx.Node | None = None  # x + attention(x)
    stream: fx.Node | None = None  # the value that the next block reads and adds to
    entry: fx.Node | None = None  # the last value before the projections
    entry_users: list[fx.Node] = field(default_factory=list)
    token_dim: int = 1
    batch_dim: int = 0
    masks: list[fx.Node] = field(default_factory=list)  # what hides keys, for the question whether it is causal


def find_attentions(gm: fx.GraphModule, axes: Axes) -> list[Attention]:
    """All attention blocks of a captured graph, numbered, in the order in which they run."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    attentions = [block for node in gm.graph.nodes if (block := _anchored(node, axes)) is not None]
    anchors = {block.anchor for block in attentions}
    for block in attentions:
        _place_on_stream(block, axes, order, anchors)
    _number(attentions)
    return attentions


def _anchored(node: fx.Node, axes: Axes) -> Attention | None:
    if node.target is SDPA:
        op = Op(node)
        return _attention(
            node, op["query"], op["key"], op["value"], op["attn_mask"], op["scale"], bool(op["is_causal"]), axes
        )
    if node.target not in SOFTMAX or not axes.knows(node):
        return None
    scores = _product_behind(node)
    product = _product_ahead(node, axes)
    if scores is None or product is None:
        return None
    rank = len(axes.of(node))
    if Op(node).dim() != rank - 1:
        return None  # normalised over the queries: slot attention, not attention
    left, right = _factors(scores)
    query, key = left, right
    value = _factors(product)[1]
    if is_parameter(left) or is_parameter(right) or is_parameter(value):
        return None
    block = _attention(node, query, key, value, None, None, False, axes)
    block.masks = _masks_between(scores, node)
    return block


def _attention(
    node: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node, mask: Any, scale: Any, causal: bool, axes: Axes
) -> Attention:
    path, place = module_path(node), source_line(node)
    block = Attention(node, query, key, value, mask, scale, causal, "self", module=path, source=place)
    block.masks = [mask] if isinstance(mask, fx.Node) else []
    tokens = _query_tokens(block, axes)
    block.tokens = times(atom.size for atom in tokens)
    block.axis = tuple(id(atom) for atom in tokens)
    keys = axes.of(value)[-2] if node.target is SDPA else axes.of(node)[-1]
    if not tokens:
        block.form = "pool"
    elif tokens != keys:
        block.form = "cross"
    return block


def _query_tokens(block: Attention, axes: Axes) -> Dim:
    return axes.of(block.anchor)[-2]


def _product_behind(softmax: fx.Node) -> fx.Node | None:
    """The q k^T that a softmax normalises, through scaling, masks, biases, soft caps and mixing of heads."""
    queue, seen = [softmax.args[0]], set()
    products = []
    while queue:
        node = queue.pop()
        if not isinstance(node, fx.Node) or node in seen or is_parameter(node):
            continue
        seen.add(node)
        if node.target in PRODUCTS:
            products.append(node)
        elif node.target in (aten.linear.default, *ELEMENTWISE) or torch.Tag.pointwise in getattr(
            node.target, "tags", ()
        ):
            queue += [n for n in node.all_input_nodes if tensor_meta(n) is not None]
    scores = tensor_meta(softmax)
    assert scores is not None
    both = [p for p in products if not any(is_parameter(f) for f in _factors(p))]
    whole = [p for p in both if (m := tensor_meta(p)) is not None and same(m.shape[-1], scores.shape[-1])]
    return min(whole, default=None)


def _masks_between(product: fx.Node, softmax: fx.Node) -> list[fx.Node]:
    """Side inputs of the scores on their way to the softmax."""
    way = {softmax}
    for node in reversed(list(_range(product, softmax))):
        if any(user in way for user in node.users) and (node is product or reaches(product, node)):
            way.add(node)
    masks = [n for node in way for n in node.all_input_nodes if node is not product and n not in way]
    return [n for n in masks if (meta := tensor_meta(n)) is not None and meta.dim() >= 2 and not is_parameter(n)]


def _range(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    nodes, node = [], first
    while node is not last:
        nodes.append(node)
        node = node.next
    return nodes


def _product_ahead(softmax: fx.Node, axes: Axes) -> fx.Node | None:
    """The product with v that attention weights end in: it contracts the dimension that was normalised."""
    keys = axes.of(softmax)[-1]
    queue, seen = [softmax], set()
    while queue:
        node = queue.pop(0)
        for user in node.users:
            if user in seen or not axes.knows(user):
                continue
            seen.add(user)
            if user.target in PRODUCTS:
                left = _factors(user)[0]
                if left is node and axes.of(left)[-1] == keys:
                    return user
            elif user.target in (aten.linear.default, *ELEMENTWISE) or torch.Tag.pointwise in getattr(
                user.target, "tags", ()
            ):
                queue.append(user)
    return None


def _factors(product: fx.Node) -> tuple[Any, Any]:
    if product.target is aten.einsum.default:
        operands: Any = product.args[1]
        return (operands[0], operands[1]) if len(operands) == 2 else (None, None)
    first = 1 if product.target is aten.baddbmm.default else 0
    return product.args[first], product.args[first + 1]


def _place_on_stream(block: Attention, axes: Axes, order: dict[fx.Node, int], anchors: set[fx.Node]) -> None:
    """Find the residual join, which of its dimensions are tokens and samples, and where the block's input enters."""
    tokens = _query_tokens(block, axes)
    where = f"{block.module} ({block.source})" if block.module else block.source
    cache = _cache_behind(block)
    if cache is not None:
        block.refusal = Refusal(*cache, where)
        return
    if block.form == "pool":
        block.refusal = Refusal("single-query", "one query reads all tokens: there is no token axis to reduce", where)
        return
    join = _join(block, order, anchors)
    if join is None:
        block.refusal = Refusal("no-residual", "the attention's output is not added to a residual stream", where)
        return
    block.join = join
    dims = axes.of(join)
    places = [d for d, dim in enumerate(dims) if dim == tokens]
    if len(places) != 1:
        block.refusal = _misplaced(tokens, dims, where)
        return
    block.token_dim = places[0]
    rest = [d for d in range(len(dims)) if d != block.token_dim][:-1]
    if len(dims) != 3 or len(rest) != 1 or block.token_dim == 2:
        block.refusal = Refusal(
            "layout", f"the stream has {len(dims)} dimensions, not samples, tokens, channels", where
        )
        return
    block.batch_dim = rest[0]
    block.stream = join
    while len(block.stream.users) == 1 and (user := next(iter(block.stream.users))).target in NORMS:
        block.stream = user
    if block.form == "cross":
        block.refusal = Refusal("cross-attention", "the keys are not tokens of the stream that would be reduced", where)
    block.entry, block.entry_users = _entry(block)


def _cache_behind(block: Attention) -> tuple[str, str] | None:
    """Whether the keys are more than those of this graph's own tokens, as code and reason of a refusal."""
    node: Any = block.key
    while isinstance(node, fx.Node) and node.target in ELEMENTWISE:
        node = node.args[0]
    if not isinstance(node, fx.Node) or block.form not in ("pool", "cross"):
        return None
    if node.target in WRITES:
        return "static-cache", "the keys are written into a cache of fixed length, which would keep the dropped ones"
    if node.target is aten.cat.default and any(n.op == "placeholder" for n in node.all_input_nodes):
        return "decode", "these tokens extend cached keys: tokens are reduced in prefill"
    return None


def _misplaced(tokens: Dim, dims: list[Dim], where: str) -> Refusal:
    flat = [atom for dim in dims for atom in dim]
    sizes = "x".join(str(atom.size) for atom in tokens)
    if all(atom in flat for atom in tokens):
        holders = [dim for dim in dims if any(atom in tokens for atom in dim)]
        if any(atom not in tokens for dim in holders for atom in dim):
            return Refusal(
                "window", f"attention runs inside windows of {sizes} tokens that are cut from a larger grid", where
            )
        return Refusal("grid", f"the stream keeps its tokens as a grid of {sizes}, in {len(holders)} dimensions", where)
    return Refusal("stream-axis", "the tokens of the queries are not the tokens of the residual stream", where)


def _join(block: Attention, order: dict[fx.Node, int], anchors: set[fx.Node]) -> fx.Node | None:
    """The first residual addition downstream whose stream is older than the attention and none of its operands."""
    anchor, own = block.anchor, (block.query, block.key, block.value)
    seen: set[fx.Node] = set()
    queue = list(anchor.users)
    while queue:
        node = min(queue, key=order.__getitem__)
        queue.remove(node)
        if node in seen or node.op == "output" or node in anchors:
            continue
        seen.add(node)
        stream = residual_of(node)
        if stream is not None and stream not in own:
            if order[stream] < order[anchor]:
                return node
            continue
        if node.op == "call_function":
            queue += list(node.users)
    return None


def _entry(block: Attention) -> tuple[fx.Node | None, list[fx.Node]]:
    """The last value on every path from the stream to the attention that no projection has touched yet."""
    assert block.join is not None
    start = residual_of(block.join)
    if start is None:
        return None, []
    graph = between(start, block.anchor)
    if block.anchor not in graph or start not in graph:
        return None, []
    idom = nx.immediate_dominators(graph, start)
    chain = [block.anchor]
    while chain[-1] is not start:
        above = idom.get(chain[-1])
        if above is None or above is chain[-1]:
            break
        chain.append(above)
    chain.reverse()
    entry = start
    for node in chain:
        if projects(node) or node is block.anchor:
            break
        meta, whole = tensor_meta(node), tensor_meta(start)
        if meta is not None and whole is not None and meta.shape == whole.shape:
            entry = node
    return entry, [user for user in entry.users if user in graph]


def _number(attentions: list[Attention]) -> None:
    """Layers count from 0 on each token axis, self- and cross-attention apart; parallel attentions share a number."""
    stacks: dict[tuple[Any, ...], list[Any]] = {}
    for block in attentions:
        joins = stacks.setdefault((block.axis, block.form), [])
        join = block.join or block.anchor
        if join not in joins:
            joins.append(join)
        block.layer = joins.index(join)
    for block in attentions:
        block.depth = len(stacks[block.axis, block.form])
