"""Keep Inductor's attention templates away from what only looks like attention.

Inductor (torch 2.13) compares a graph with 30 serialized attention templates whose constants are wildcards: a softmax
over the queries, a permuted key, `mask == 2` in place of `mask == 0` or a fill with 0 all match, and are replaced by
SDPA with other numbers (pytorch issues 195282 and 195320). So whatever the matcher does not confirm gets one op that no
template holds and that changes nothing: `clamp_min(weights, 0)`, which is fused into the softmax's last loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokred.compiler.capture import module_path, source_line, tensor_meta
from tokred.compiler.relations import Op
from tokred.passes.constants import CASTS
from tokred.passes.contractions import product_of
from tokred.passes.graph_edit import copy_graph, erase_unused, inherit
from tokred.passes.indices import PERMUTES, SAME, VIEWS, permutation
from tokred.passes.match_attention import SOFTMAX, Match, Surroundings, match_attention
from tokred.passes.scores import FILLS, WHERE, Added

__all__ = ["shield_softmax"]

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.einsum.default}
# What the templates hold between a product and a softmax, and what Inductor decomposes into that.
BETWEEN = (
    VIEWS
    | PERMUTES
    | SAME
    | CASTS
    | WHERE
    | FILLS
    | {
        aten.expand.default,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.rsub.Scalar,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.true_divide.Tensor,
        aten.addcmul.default,
        aten.addcdiv.default,
        aten.neg.default,
        aten.reciprocal.default,
        aten.dropout.default,
        aten.native_dropout.default,
        aten.detach.default,
        aten.slice.Tensor,
        aten.select.int,
    }
)


def shield_softmax(gm: fx.GraphModule, lines: list[str]) -> fx.GraphModule:
    """Protect every look-alike of attention from Inductor's templates. Same numbers, also in the backward.

    Returns `gm` itself where nothing needs it; one line per place. Run it last: it sees the graph that is lowered.
    """
    around = Surroundings(gm.graph)
    places = [node for node in gm.graph.nodes if _normalises(node) and _looks_like_attention(node)]
    exposed = {node.name for node in places if not _is_read_rightly(node, around)}
    permuted = {node.name for node in gm.graph.nodes if node.target is SDPA and _odd_operands(node)}
    if not exposed and not permuted:
        return gm
    new = copy_graph(gm)
    unused = {node for node in new.graph.nodes if not node.users}
    for node in list(new.graph.nodes):
        if node.name in exposed:
            _clamp(new.graph, node)
            lines.append(f"{_where(node)}: {node.name} is no attention that Inductor's templates would read rightly")
        elif node.name in permuted:
            _permute_plainly(new.graph, node)
            lines.append(f"{_where(node)}: {node.name} reads permuted operands that Inductor's templates would misread")
    erase_unused(new.graph, unused)
    new.graph.lint()
    new.recompile()
    return new


def _where(node: fx.Node) -> str:
    return f"{module_path(node) or 'graph'} ({source_line(node)})"


# -- softmax between two products --------------------------------------------------------------------------------------


def _normalises(node: fx.Node) -> bool:
    """A softmax, or one that is spelled out: the templates know it as `e / e.sum()`."""
    if node.target in SOFTMAX:
        return True
    if node.target not in (aten.div.Tensor, aten.true_divide.Tensor):
        return False
    whole: Any = node.args[1]
    while isinstance(whole, fx.Node) and whole.target in VIEWS | CASTS | SAME | {aten.expand.default}:
        whole = whole.args[0]
    return (
        isinstance(whole, fx.Node)
        and whole.target is aten.sum.dim_IntList
        and _bare(whole.args[0]) is _bare(node.args[0])
    )


def _bare(node: Any, through: Any = CASTS | SAME) -> Any:
    while isinstance(node, fx.Node) and node.target in through:
        node = node.args[0]
    return node


def _looks_like_attention(node: fx.Node) -> bool:
    if all(user.target is aten.clamp_min.default and user.args[1] == 0 for user in node.users):
        return False
    inputs = node.all_input_nodes
    if node.target not in SOFTMAX:
        inputs = _exponent(_bare(node.args[0]))
    return _reaches_product(inputs, ahead=False) and _reaches_product(list(node.users), ahead=True)


def _exponent(node: Any) -> list[fx.Node]:
    """`exp(x - amax(x))` -> what x and the subtraction come from."""
    if not isinstance(node, fx.Node) or node.target is not aten.exp.default:
        return []
    inner = _bare(node.args[0])
    return [inner] if isinstance(inner, fx.Node) else []


def _reaches_product(queue: list[fx.Node], *, ahead: bool) -> bool:
    seen: set[fx.Node] = set()
    queue = list(queue)
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in PRODUCTS:
            return True
        if node.target in BETWEEN:
            queue += list(node.users) if ahead else node.all_input_nodes
    return False


def _is_read_rightly(node: fx.Node, around: Surroundings) -> bool:
    """Whether this is an attention (left alone on request, or with dropout) in the spelling of the templates."""
    if node.target is aten._safe_softmax.default or node.target not in SOFTMAX:
        return False
    found = match_attention(node, around)
    if not isinstance(found, Match):
        return False
    source, first, last = tensor_meta(node.args[0]), product_of(found.path[0]), product_of(found.product)
    if source is None or first is None or last is None or first.bias is not None:
        return False
    plain_masks = all(isinstance(term, Added) and _is_float(term.mask) for term in found.terms)
    over_keys = Op(node).dim() == source.dim() - 1
    weights_first = last.left is found.path[-1]
    return plain_masks and over_keys and weights_first and _plain_operands(first.left, first.right, last.right)


def _is_float(node: fx.Node) -> bool:
    meta = tensor_meta(node)
    return meta is not None and meta.is_floating_point()


# -- permuted operands: the templates take any permutation for the one that they were written with ---------------------


def _plain_operands(query: fx.Node, key: fx.Node, value: fx.Node) -> bool:
    """[B N H D] -> [B H N D] or nothing for each, and then [.. M D] -> [.. D M] for the key."""
    if query.graph is not key.graph or _bare(key, SAME).target not in PERMUTES:
        return False
    rank = len(key.meta["val"].shape)
    turned = permutation(_bare(key, SAME), rank)
    if turned != [*range(rank - 2), rank - 1, rank - 2]:
        return False
    return all(_swaps_heads(operand) is not False for operand in (query, _bare(key, SAME).args[0], value))


def _swaps_heads(operand: Any) -> bool | None:
    """Whether the last permutation of an operand is [B N H D] -> [B H N D]; None where there is none."""
    node = _bare(operand, SAME)
    if not isinstance(node, fx.Node) or node.target not in PERMUTES:
        return None
    rank = len(node.meta["val"].shape)
    return rank >= 4 and permutation(node, rank) == [0, 2, 1, *range(3, rank)]


def _odd_operands(node: fx.Node) -> list[str]:
    """The operands of an SDPA whose permutation the templates would misread, should Inductor decompose it."""
    op = Op(node)
    swaps = {name: _swaps_heads(op[name]) for name in ("query", "key", "value")}
    if any(swap is None for swap in swaps.values()) or len(node.meta["val"].shape) < 4:
        return []
    return [name for name, swap in swaps.items() if swap is False]


# -- the two edits -----------------------------------------------------------------------------------------------------


def _clamp(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_after(node):
        new = graph.call_function(aten.clamp_min.default, (node, 0))
    new.meta["val"] = node.meta["val"]
    inherit([new], node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _permute_plainly(graph: fx.Graph, node: fx.Node) -> None:
    """x.permute(p) -> x.permute(r).transpose(1, 2): the same tensor, and the last step is what the templates expect."""
    for i, name in enumerate(("query", "key", "value")):
        if name not in _odd_operands(node):
            continue
        old = _bare(node.args[i], SAME)
        rank = len(old.meta["val"].shape)
        p = permutation(old, rank)
        with graph.inserting_before(node):
            first = graph.call_function(aten.permute.default, (old.args[0], [p[0], p[2], p[1], *p[3:]]))
            second = graph.call_function(aten.transpose.int, (first, 1, 2))
        first.meta["val"] = old.meta["val"].transpose(1, 2)
        second.meta["val"] = old.meta["val"]
        inherit([first, second], node)
        node.update_arg(i, second)
