"""Recognise `softmax(q k^T * scale + masks) v` in any spelling, by dataflow from the softmax.

Nothing is taken on trust: which dimension was normalised, which one the weights are summed over, every constant and
every broadcast is read from the graph, and what cannot be read is a refusal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import fx

from tokred.compiler.blocks import is_parameter
from tokred.compiler.capture import module_path, source_line, tensor_meta
from tokred.compiler.relations import Op, same
from tokred.compiler.report import Refusal
from tokred.passes.constants import CASTS, constant, magnitude
from tokred.passes.contractions import Contraction, Product, contract, product_of
from tokred.passes.indices import PERMUTES, SAME, VIEWS, Dim, Layout, after, flat, leaves, resolve, same_shape
from tokred.passes.operands import Operand, climb

__all__ = ["SOFTMAX", "Added", "Filled", "Match", "Surroundings", "match_attention"]

aten = torch.ops.aten

SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
REARRANGING = VIEWS | PERMUTES | SAME | CASTS | {aten.expand.default}
WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
REGIONS = {"_set_grad_enabled", "_enter_autocast", "_exit_autocast"}
MOST_PATHS = 16  # scores may be a sum of several products: each is tried as q k^T, the others are masks then
MODERATE = 1e4  # a bias below this hides no key beside a fill of -1e9
DEEPEST = 40  # nodes between q k^T and its softmax; the longest seen (a decomposed relative position) has 12


@dataclass
class Added:
    """`scores + factor * mask`; `layout` are the mask's dimensions."""

    mask: fx.Node
    factor: float
    layout: Layout


@dataclass
class Filled:
    """Scores replaced by `value` where `condition` holds (or, inverted, where it does not)."""

    condition: fx.Node
    inverted: bool
    value: float
    layout: Layout


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


def _refuse(code: str, reason: str, node: fx.Node) -> Refusal:
    path, line = module_path(node), source_line(node)
    return Refusal(code, reason, f"{path} ({line})" if path else line)


# -- the way: from the softmax to the values, and back to the scores ---------------------------------------------------


def _ahead(softmax: fx.Node, around: Surroundings) -> tuple[list[fx.Node], Product, float] | Refusal:
    """The nodes from the softmax (included) to the product with the values, and the dropout on the way."""
    node, weights, dropout = softmax, [softmax], 0.0
    while True:
        users = around.users(node)
        if len(users) != 1:
            return _refuse("extra-use", f"the attention weights have {len(users)} uses, not one", softmax)
        user = users[0]
        product = product_of(user)
        if product is not None:
            if product.bias is not None or product.alpha != 1.0 or product.left is product.right:
                return _refuse("values", f"{user.name} is more than weights times values", softmax)
            return weights, product, dropout
        if user.target in (aten.dropout.default, aten.native_dropout.default):
            dropout = max(dropout, _dropout(user))
            if user.target is aten.native_dropout.default:
                return _refuse("dropout", "dropout of the weights in training", softmax)
        elif user.target not in REARRANGING or not _keeps_device(user):
            return _refuse(
                "no-values", f"the weights go through {user.target}, not into a product with values", softmax
            )
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
        yield _refuse("no-scores", f"the softmax normalises {start.name}, not a product of queries and keys", start)
    else:
        operands = _scores_operands(start)
        if not operands:
            yield _refuse("op", f"{start.target} between the scores and the softmax", start)
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


# -- the reading: scale, masks and indices along one path --------------------------------------------------------------


@dataclass
class _Scores:
    """What is known of the scores at one point of the path."""

    node: fx.Node
    layout: Layout
    scale: float
    terms: list[Added | Filled] = field(default_factory=list)

    def multiply(self, factor: float) -> None:
        self.scale *= factor
        for term in self.terms:
            if isinstance(term, Added):
                term.factor *= factor
            else:
                term.value *= factor

    def beside(self, node: fx.Node) -> Layout | None:
        """The layout of a tensor that is broadcast against the scores; None where it would enlarge them."""
        meta, own = tensor_meta(node), tensor_meta(self.node)
        assert own is not None
        if meta is None or meta.dim() > own.dim():
            return None
        layout = []
        for size, dim, whole in zip(reversed(meta.shape), reversed(self.layout), reversed(own.shape), strict=False):
            if not same(size, 1) and not same(size, whole):
                return None
            layout.append(() if same(size, 1) else dim)
        return tuple(reversed(layout))


def _read(
    path: list[fx.Node], softmax: fx.Node, weights: list[fx.Node], last: Product, around: Surroundings
) -> Match | Refusal:
    first = product_of(path[0])
    assert first is not None
    for node in path:
        if len(around.users(node)) != 1:
            return _refuse("extra-use", f"the scores are used elsewhere too ({node.name})", softmax)
    if any(around.region[node] != around.region[last.node] for node in [*path, *weights]):
        return _refuse("region", "gradients or autocast are switched on or off inside", softmax)
    names = contract(first)
    if names is None:
        return _refuse("contraction", f"{first.node.name} sums over more than the product of queries and keys", softmax)
    scores = _Scores(first.node, names.out, first.alpha)
    if first.bias is not None and (refusal := _add(scores, first.bias, first.beta, softmax)) is not None:
        return refusal
    for node in path[1:]:
        refusal = _step(scores, node, softmax)
        if refusal is not None:
            return refusal
        scores.node = node
    return _assemble(scores, names, path, softmax, weights, last, around)


def _step(scores: _Scores, node: fx.Node, softmax: fx.Node) -> Refusal | None:
    """Take one node of the path into account."""
    target = node.target
    if target is aten.dropout.default or target in CASTS:
        return None
    if target in REARRANGING:
        layout = after(node, scores.layout)
        if layout is None:
            return _refuse("layout", f"cannot follow the scores through {node.name}", softmax)
        scores.layout = layout
        return None
    meta, own = tensor_meta(node), tensor_meta(scores.node)
    if meta is None or own is None or not same_shape(meta.shape, own.shape):
        return _refuse("layout", f"{node.name} changes the shape of the scores", softmax)
    if target is aten.neg.default:
        scores.multiply(-1.0)
        return None
    if target in (aten.mul.Tensor, aten.div.Tensor):
        return _scale(scores, node, softmax)
    if target in (aten.add.Tensor, aten.sub.Tensor):
        other = node.args[1] if node.args[0] is scores.node else node.args[0]
        alpha = constant(Op(node)["alpha"])
        if alpha is None or (alpha != 1.0 and other is node.args[0]):
            return _refuse("scale", f"{node.name} scales the scores by an alpha", softmax)
        return _add(scores, other, -alpha if target is aten.sub.Tensor else alpha, softmax)
    return _fill(scores, node, softmax)


def _scale(scores: _Scores, node: fx.Node, softmax: fx.Node) -> Refusal | None:
    other = node.args[1] if node.args[0] is scores.node else node.args[0]
    number = constant(other)
    if number is None:
        return _refuse("data-scale", f"the scores are multiplied by {other}, which is no constant", softmax)
    if number == 0.0 or not math.isfinite(number):
        return _refuse("scale", f"the scores are scaled by {number}", softmax)
    scores.multiply(1.0 / number if node.target is aten.div.Tensor else number)
    return None


def _add(scores: _Scores, other: Any, factor: float, softmax: fx.Node) -> Refusal | None:
    number = constant(other)
    if number is not None and math.isfinite(number):
        return None  # a softmax is blind to what is added to all scores
    if not isinstance(other, fx.Node) or other is scores.node or not _is_real(other):
        return _refuse("mask", f"{other} is added to the scores", softmax)
    layout = scores.beside(other)
    if layout is None:
        return _refuse("layout", f"{other.name} is larger than the scores that it is added to", softmax)
    scores.terms.append(Added(other, factor, layout))
    return None


def _fill(scores: _Scores, node: fx.Node, softmax: fx.Node) -> Refusal | None:
    op = Op(node)
    if node.target in FILLS:
        condition, inverted, value = op["mask"], False, constant(op["value"])
    else:
        inverted = node.args[1] is scores.node
        condition, value = op["condition"], constant(node.args[2] if inverted else node.args[1])
    if value is None:
        return _refuse("fill", f"{node.name} replaces scores by what is no constant", softmax)
    meta = tensor_meta(condition)
    if not isinstance(condition, fx.Node) or meta is None or meta.dtype != torch.bool or meta.device != _device(node):
        return _refuse("mask", f"{condition} is no boolean mask", softmax)
    layout = scores.beside(condition)
    if layout is None:
        return _refuse("layout", f"{condition.name} is larger than the scores that it masks", softmax)
    scores.terms.append(Filled(condition, inverted, value, layout))
    return None


def _is_real(node: fx.Node) -> bool:
    meta = tensor_meta(node)
    return meta is not None and not meta.is_complex()


def _device(node: fx.Node) -> torch.device:
    meta = tensor_meta(node)
    assert meta is not None
    return meta.device


# -- the verdict -------------------------------------------------------------------------------------------------------


def _assemble(
    scores: _Scores,
    names: Contraction,
    path: list[fx.Node],
    softmax: fx.Node,
    weights: list[fx.Node],
    last: Product,
    around: Surroundings,
) -> Match | Refusal:
    first = product_of(path[0])
    assert first is not None
    layout: Layout | None = scores.layout
    for node in weights[1:]:
        if layout is not None and node.target not in CASTS and node.target is not aten.dropout.default:
            layout = after(node, layout)
    if layout is None:
        return _refuse("layout", "cannot follow the weights to the product with the values", softmax)
    on_left = last.left is weights[-1]
    ends = contract(last, left=layout) if on_left else contract(last, right=layout)
    if ends is None:
        return _refuse("contraction", f"{last.node.name} sums weights or values by themselves", softmax)
    dim = Op(softmax).dim()
    keys = leaves(scores.layout[dim])
    if not keys:
        return _refuse("one-key", "there is one key only: nothing to attend to", softmax)
    if set(leaves(ends.summed)) != set(keys):
        return _refuse(
            "softmax-dim", "the weights are not summed over the dimension that the softmax normalised", softmax
        )
    left, right = set(flat(names.left)), set(flat(names.right))
    if set(keys) <= right - left:
        query, key, q_layout, k_layout = first.left, first.right, names.left, names.right
    elif set(keys) <= left - right:
        query, key, q_layout, k_layout = first.right, first.left, names.right, names.left
    else:
        return _refuse("softmax-dim", "the softmax does not normalise over the keys alone", softmax)
    value, v_layout = (last.right, ends.right) if on_left else (last.left, ends.left)
    rows, batch = _rows(resolve(scores.layout), dim, set(flat(q_layout)) - set(flat(k_layout)))
    weighed = set(flat(layout))
    features = tuple(index for index in flat(ends.out) if index not in weighed)
    if not set(flat(v_layout)) <= {*batch, *keys, *features} or set(flat(ends.out)) != {*batch, *rows, *features}:
        return _refuse("contraction", "the values differ from query to query, or queries are summed", softmax)
    dtype = last.node.meta["val"].dtype
    if not _precise_enough([*path, *weights], dtype):
        return _refuse("dtype", f"the scores are rounded more coarsely than {dtype}", softmax)
    region = around.region[last.node]
    within = lambda node: around.region[node] == region  # noqa: E731
    operands = [
        climb(query, q_layout, dtype, within, scaled=True),
        climb(key, k_layout, dtype, within, scaled=True),
        climb(value, v_layout, dtype, within, scaled=False),
    ]
    if any(operand is None for operand in operands):
        return _refuse("dtype", f"queries, keys and values are not all {dtype}", softmax)
    if any(operand is not None and is_parameter(operand.root) for operand in operands):
        return _refuse("parameter", "queries, keys or values are a parameter: a linear layer, not attention", softmax)
    q, k, v = operands
    assert q is not None and k is not None and v is not None
    scale = scores.scale * q.scale * k.scale
    if not (scale > 0.0 and math.isfinite(scale)):
        return _refuse("scale", f"the scores are scaled by {scale}", softmax)
    refusal = _check_terms(scores.terms, dtype, softmax)
    if refusal is not None:
        return refusal
    depth = leaves(names.summed)
    return Match(
        softmax,
        last.node,
        path + weights,
        q,
        k,
        v,
        scale,
        scores.terms,
        batch,
        rows,
        keys,
        depth,
        features,
        resolve(ends.out),
    )


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


def _check_terms(terms: list[Added | Filled], dtype: torch.dtype, softmax: fx.Node) -> Refusal | None:
    """Whether the masks have an exact equivalent in SDPA."""
    fills = [term for term in terms if isinstance(term, Filled)]
    finite = {term.value for term in fills if math.isfinite(term.value)}
    if any(not term.value < 0 for term in fills):
        return _refuse("fill", "masked scores get a value that does not hide them", softmax)
    if not finite:
        return None
    added = [term for term in terms if isinstance(term, Added)]
    if added and (terms[: len(added)] != added or any(not magnitude(term.mask) < MODERATE for term in added)):
        return _refuse(
            "fill-and-bias", "a row that a finite fill and an additive mask hide together has no equivalent", softmax
        )
    if len(finite) > 1 or any(math.isinf(term.value) for term in fills):
        return _refuse("fill", "two different values fill masked scores", softmax)
    if finite.pop() > (-6e4 if dtype is torch.float16 else -1e9):  # exp(fill - score) must be 0 for any sane score
        return _refuse("fill", "masked scores get a value that may not hide them", softmax)
    return None
