"""Recognise `softmax(q k^T * scale + masks) v` in any spelling, by dataflow from the softmax.

Nothing is taken on trust: which dimension was normalised, which one the weights are summed over, every constant and
every broadcast is read from the graph, and what cannot be read is a refusal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import fx

from tokred.compiler.capture import is_parameter, tensor_meta
from tokred.compiler.relations import Op
from tokred.compiler.report import Refusal
from tokred.passes.constants import CASTS, constant
from tokred.passes.contractions import Contraction, Product, contract, product_of
from tokred.passes.indices import Dim, Layout, after, flat, leaves, resolve
from tokred.passes.operands import Operand, climb
from tokred.passes.scores import FILLS, REARRANGING, WHERE, Added, Filled, Scores, refuse

__all__ = ["SOFTMAX", "Match", "Surroundings", "match_attention"]

aten = torch.ops.aten

SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
REGIONS = {"_set_grad_enabled", "_enter_autocast", "_exit_autocast"}
MOST_PATHS = 16  # scores may be a sum of several products: each is tried as q k^T, the others are masks then
DEEPEST = 40  # nodes between q k^T and its softmax; the longest seen (a decomposed relative position) has 12


@dataclass
class Match:
    """One attention: operands, and index groups `[batch rows depth] x [batch keys depth] -> [batch rows keys]`."""

    softmax: fx.Node
    product: fx.Node  # the last node: weights x values
    path: list[fx.Node]  # from q k^T to the last product, without it
    query: Operand
    key: Operand
    value: Operand
    scale: float
    terms: list[Added | Filled]
    batch: Dim
    rows: Dim
    keys: Dim
    depth: Dim
    features: Dim
    out: Layout
    dropout: float = 0.0


class Surroundings:
    """What the matcher needs to know about the whole graph."""

    def __init__(self, graph: fx.Graph):
        self.region: dict[fx.Node, int] = {}
        region = 0
        for node in graph.nodes:
            if node.op == "call_function" and getattr(node.target, "__name__", "") in REGIONS:
                region += 1  # gradients or autocast change here: nothing may move across
            self.region[node] = region
        self.live: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            if (
                node.op in ("output", "placeholder")
                or node.is_impure()
                or any(user in self.live for user in node.users)
            ):
                self.live.add(node)

    def users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user in self.live]


def match_attention(softmax: fx.Node, around: Surroundings) -> Match | Refusal:
    """The attention that `softmax` is the middle of, or why it is none."""
    ahead = _ahead(softmax, around)
    if isinstance(ahead, Refusal):
        return ahead
    weights, last, dropout = ahead
    refusals: dict[str, Refusal] = {}
    for path in islice(_paths(softmax.args[0], [], set()), MOST_PATHS):
        found = path if isinstance(path, Refusal) else _read(path, softmax, weights, last, around)
        if isinstance(found, Match):
            found.dropout = dropout
            return found
        refusals.setdefault("dead end" if isinstance(path, Refusal) else "read", found)
    return refusals.get("read") or refusals["dead end"]


# -- the way: from the softmax to the values, and back to the scores ---------------------------------------------------


def _ahead(softmax: fx.Node, around: Surroundings) -> tuple[list[fx.Node], Product, float] | Refusal:
    """The nodes from the softmax (included) to the product with the values, and the dropout on the way."""
    node, weights, dropout = softmax, [softmax], 0.0
    while True:
        users = around.users(node)
        if len(users) != 1:
            return refuse("extra-use", f"the attention weights have {len(users)} uses, not one", softmax)
        user = users[0]
        product = product_of(user)
        if product is not None:
            if product.bias is not None or product.alpha != 1.0 or product.left is product.right:
                return refuse("values", f"{user.name} is more than weights times values", softmax)
            return weights, product, dropout
        if user.target in (aten.dropout.default, aten.native_dropout.default):
            dropout = max(dropout, _dropout(user))
            if user.target is aten.native_dropout.default:
                return refuse("dropout", "dropout of the weights in training", softmax)
        elif user.target not in REARRANGING or not _keeps_device(user):
            return refuse("no-values", f"the weights go through {user.target}, not into a product with values", softmax)
        node = user
        weights.append(node)


def _dropout(node: fx.Node) -> float:
    op = Op(node)
    return float(op["p"]) if op["train"] else 0.0


def _paths(start: Any, tail: list[fx.Node], seen: set[fx.Node]) -> Iterator[list[fx.Node] | Refusal]:
    """Every way back from the softmax's input to a product, as lists that begin with it; refusals for dead ends."""
    path = [start, *tail]
    if start in seen:
        return
    seen.add(start)
    if product_of(start) is not None:
        yield path
    elif start.op != "call_function" or tensor_meta(start) is None or len(path) > DEEPEST:
        yield refuse("no-scores", f"the softmax normalises {start.name}, not a product of queries and keys", start)
    else:
        operands = _scores_operands(start)
        if not operands:
            yield refuse("op", f"{start.target} between the scores and the softmax", start)
        for operand in operands:
            yield from _paths(operand, path, seen)


def _scores_operands(node: fx.Node) -> list[Any]:
    """Which arguments of `node` may be the scores, the likeliest first."""
    target, args = node.target, node.args
    if target in REARRANGING or target in FILLS or target is aten.neg.default:
        return [args[0]] if _keeps_device(node) else []
    if target is aten.dropout.default:
        return [args[0]] if _dropout(node) == 0.0 else []
    if target in (aten.add.Tensor, aten.mul.Tensor):
        return [x for x in args[:2] if isinstance(x, fx.Node) and not is_parameter(x)]
    if target in (aten.div.Tensor, aten.sub.Tensor):
        return [x for x in args[:1] if isinstance(x, fx.Node)]
    if target in WHERE:
        return [x for x in args[1:3] if isinstance(x, fx.Node) and constant(x) is None]
    return []


def _keeps_device(node: fx.Node) -> bool:
    meta, source = tensor_meta(node), tensor_meta(node.args[0])
    return meta is not None and source is not None and meta.device == source.device


def _read(
    path: list[fx.Node], softmax: fx.Node, weights: list[fx.Node], last: Product, around: Surroundings
) -> Match | Refusal:
    """One way from a product to the softmax, and on to the values: attention or not."""
    first = product_of(path[0])
    assert first is not None
    for node in path:
        if len(around.users(node)) != 1:
            return refuse("extra-use", f"the scores are used elsewhere too ({node.name})", softmax)
    if any(around.region[node] != around.region[last.node] for node in [*path, *weights]):
        return refuse("region", "gradients or autocast are switched on or off inside", softmax)
    dtype = last.node.meta["val"].dtype
    if not _precise_enough([*path, *weights], dtype):
        return refuse("dtype", f"the scores are rounded more coarsely than {dtype}", softmax)
    names = contract(first)
    if names is None:
        return refuse("contraction", f"{first.node.name} sums over more than the product of queries and keys", softmax)
    scores = Scores(first.node, names.out, first.alpha, softmax)
    refusal = scores.add(first.bias, first.beta) if first.bias is not None else None
    for node in path[1:]:
        refusal = refusal or scores.step(node)
    roles = refusal or _roles(scores, first, names, weights, last)
    if isinstance(roles, Refusal):
        return roles
    refusal = scores.unlike_sdpa(dtype)
    if refusal is not None:
        return refusal
    region = around.region[last.node]
    operands = [
        climb(node, layout, dtype, lambda n: around.region[n] == region, scaled=role != "value")
        for role, (node, layout) in roles.operands.items()
    ]
    if any(operand is None for operand in operands):
        return refuse("dtype", f"queries, keys and values are not all {dtype}", softmax)
    found = [operand for operand in operands if operand is not None]
    if any(is_parameter(operand.root) for operand in found):
        return refuse("parameter", "queries, keys or values are a parameter: a linear layer, not attention", softmax)
    query, key, value = found
    scale = scores.scale * query.scale * key.scale
    if not (scale > 0.0 and math.isfinite(scale)):
        return refuse("scale", f"the scores are scaled by {scale}", softmax)
    depth = leaves(names.summed)
    return Match(
        softmax, last.node, path + weights, query, key, value, scale, scores.terms, depth=depth, **roles.groups
    )


@dataclass
class _Roles:
    """Which operand is the query, the key and the value; which indices are samples and heads, rows, keys, features."""

    operands: dict[str, tuple[fx.Node, Layout]]
    groups: dict[str, Any]


def _roles(
    scores: Scores, first: Product, names: Contraction, weights: list[fx.Node], last: Product
) -> _Roles | Refusal:
    softmax = scores.softmax
    layout: Layout | None = scores.layout
    for node in weights[1:]:
        if layout is not None and node.target not in CASTS and node.target is not aten.dropout.default:
            layout = after(node, layout)
    if layout is None:
        return refuse("layout", "cannot follow the weights to the product with the values", softmax)
    on_left = last.left is weights[-1]
    ends = contract(last, left=layout) if on_left else contract(last, right=layout)
    if ends is None:
        return refuse("contraction", f"{last.node.name} sums weights or values by themselves", softmax)
    dim = Op(softmax).dim()
    keys = leaves(scores.layout[dim])
    if not keys:
        return refuse("one-key", "there is one key only: nothing to attend to", softmax)
    if set(leaves(ends.summed)) != set(keys):
        reason = "the weights are not summed over the dimension that the softmax normalised"
        return refuse("softmax-dim", reason, softmax)
    left, right = (first.left, names.left), (first.right, names.right)
    for query, key in ((left, right), (right, left)):
        if set(keys) <= set(flat(key[1])) - set(flat(query[1])):
            break
    else:
        return refuse("softmax-dim", "the softmax does not normalise over the keys alone", softmax)
    value = (last.right, ends.right) if on_left else (last.left, ends.left)
    rows, batch = _rows(resolve(scores.layout), dim, set(flat(query[1])) - set(flat(key[1])))
    weighed = set(flat(layout))
    features = tuple(index for index in flat(ends.out) if index not in weighed)
    if not set(flat(value[1])) <= {*batch, *keys, *features} or set(flat(ends.out)) != {*batch, *rows, *features}:
        return refuse("contraction", "the values differ from query to query, or queries are summed", softmax)
    operands = {"query": query, "key": key, "value": value}
    out = resolve(ends.out)
    return _Roles(operands, {"batch": batch, "rows": rows, "keys": keys, "features": features, "out": out})


def _rows(layout: Layout, softmax_dim: int, query_only: set[Any]) -> tuple[Dim, Dim]:
    """The query rows, which is the last dimension that only the queries have, and everything else but the keys."""
    rows: Dim = ()
    place = None
    for d in range(len(layout)):
        if d != softmax_dim and layout[d] and set(layout[d]) <= query_only:
            rows, place = layout[d], d
    batch = tuple(index for d, dim in enumerate(layout) if d not in (softmax_dim, place) for index in dim)
    return rows, batch


def _precise_enough(nodes: list[fx.Node], dtype: torch.dtype) -> bool:
    """Whether no value between the scores and the product with v is rounded to less than `dtype`."""
    if not dtype.is_floating_point:
        return False
    seen = {n.meta["val"].dtype for n in nodes}
    return all(d.is_floating_point and torch.promote_types(d, dtype) == d for d in seen)
