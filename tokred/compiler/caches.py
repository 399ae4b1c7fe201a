"""KV caches: keys and values that the graph returns. They stay as short as the attention that made them.

Dynamo knows nothing of token maps, so what else a caller must know, which rows of each layer's cache are left, goes
beside the graph's results to whoever collects it during the call (tokred.generation does).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tokred.compiler.attention import Attention
from tokred.compiler.capture import tensor_meta
from tokred.compiler.extras import Extra
from tokred.compiler.graphs import nearest
from tokred.compiler.relations import same
from tokred.compiler.residual import CONTRACTIONS, residual_of

__all__ = ["Caches", "Delivered", "Kept", "collect", "find_caches"]

aten = torch.ops.aten

COPIES = {
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.detach.default,
    aten.alias.default,
    aten.slice.Tensor,
}


@dataclass(frozen=True)
class Kept:
    """Cached keys or values [B H K D] of which `rows` [B K] says which of the prompt's N tokens they belong to."""

    cached: Tensor
    rows: Tensor
    tokens: int


@dataclass
class Caches:
    """whole  results of the graph that hold all keys (values) of an attention, with the number of the result
    cut    attentions of which only the last keys are returned (a sliding window)
    other  projections of keys (values) of which the graph returns something else, with the attention they serve
    """

    whole: dict[fx.Node, int]
    cut: set[Attention]
    other: dict[fx.Node, Attention]


def find_caches(gm: fx.GraphModule, attentions: list[Attention]) -> Caches:
    """Which results are keys or values of self-attentions, looked for through copies and views."""
    owner: dict[fx.Node, Attention] = {}
    for block in attentions:
        for operand in (block.key, block.value) if block.form == "self" else ():
            owner |= {node: block for node, whole in _copied(operand) if whole}
    caches = Caches({}, set(), {})
    results: Any = gm.graph.output_node().args[0]
    for number, result in enumerate(results):
        for node, whole in _copied(result) if tensor_meta(result) is not None else ():
            if node in owner:
                if whole:
                    caches.whole[result] = number
                else:
                    caches.cut.add(owner[node])
                break
    projections = {node: block for block in attentions for node in _projections(block)}
    for result in results:
        # A hidden state comes from what writes to the stream, an attention's weights from q k^T, a cache from what
        # projects to keys and values: this tells them apart whatever a cache looks like.
        if result not in caches.whole and tensor_meta(result) is not None:
            made_of = nearest(result, CONTRACTIONS)
            caches.other |= {node: projections[node] for node in made_of if node in projections}
    return caches


def _projections(block: Attention) -> set[fx.Node]:
    """What projects the stream to the keys and values that attend to it: every contraction between the two.

    Empty for keys of another stream (cross-attention): they are computed again from what that stream's graph returns.
    """
    starts = {block.entry, residual_of(block.join)} if block.join is not None else set()
    found, of_stream = set(), False
    queue, seen = [block.key, block.value], {block.key, block.value}
    while queue:
        node = queue.pop()
        joins = residual_of(node) is not None
        if node in starts or joins:
            of_stream = of_stream or node in starts or not starts
            continue
        if node.target in CONTRACTIONS:
            found.add(node)
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return found if of_stream else set()


def _copied(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """A value and what it is a copy or a view of, nearest first, and whether it still has all of that."""
    whole = True
    while True:
        yield node, whole
        if node.op != "call_function" or node.target not in COPIES:
            return
        source: Any = node.args[0]
        if node.target is aten.slice.Tensor:
            before, after = tensor_meta(source), tensor_meta(node)
            assert before is not None and after is not None
            whole = whole and all(same(a, b) for a, b in zip(before.shape, after.shape, strict=True))
        node = source


_local = threading.local()


@contextmanager
def collect() -> Iterator[list[Kept]]:
    """Receive what compiled graphs that run inside say about the caches that they return."""
    outer, _local.kept = getattr(_local, "kept", None), []
    try:
        yield _local.kept
    finally:
        _local.kept = outer


class Delivered(Extra):
    """Results that say which rows are left in caches: (cache, its result's number; number of the extra result that has
    its rows; number of tokens that there were) for each. They go to whoever collects them."""

    def __init__(self, places: list[tuple[int, int, int]]):
        self.places = places
        self.results = 1 + max(rows for _, rows, _ in places)

    def take(self, own: Sequence[Any], more: Sequence[Any]) -> None:
        kept = getattr(_local, "kept", None)
        if kept is not None:
            kept += [Kept(own[cached], more[rows], tokens) for cached, rows, tokens in self.places]
