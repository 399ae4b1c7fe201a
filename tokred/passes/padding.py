"""Which rows of a padded batch does anyone read? Claims, collected while a graph is packed, and computed at run time.

A row is *real* if some attention may see its key, if a factor that it is pooled with is not zero there, or if it is
read by its position. All others are padding: what they hold influences nothing that the graph returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from tokred.compiler.capture import tensor_meta
from tokred.compiler.graphs import ancestors, as_module
from tokred.compiler.record import record
from tokred.compiler.relations import Op, same
from tokred.compiler.work import flops
from tokred.passes.constants import CASTS

__all__ = ["Claims", "PaddingIsRead"]

aten = torch.ops.aten

AND = {aten.__and__.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor}
COPIES = CASTS | {aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default}

Claim = Callable[[list[Tensor]], Tensor]  # from what it looks at to a mask that broadcasts to [B N]


class PaddingIsRead(Exception):
    """Why the tokens of this graph cannot be packed: a code, a sentence, and the node in the way."""

    def __init__(self, code: str, reason: str, node: fx.Node):
        super().__init__(reason)
        self.code, self.node = code, node


class Claims:
    """What makes a row [b, n] of B samples of N tokens real. A claim looks at nodes of the graph to be packed."""

    def __init__(self, batch: Any, tokens: Any):
        self.batch, self.tokens = batch, tokens
        self._made: dict[Any, tuple[list[fx.Node], Claim]] = {}

    def keys(self, mask: fx.Node) -> None:
        """Keys that a mask of an attention, as SDPA takes it, shows to any query."""
        self._made["keys", mask] = _conjuncts(mask), _visible

    def shown(self, node: fx.Node, batch_dim: int, token_dim: int, *, by: bool) -> None:
        """Rows at which `node` is somewhere not zero (`by` True) or zero. A dimension below zero: the same for all."""
        while True:  # what is before a copy is smaller
            source = node.args[0] if node.op == "call_function" and node.args else None
            meta = tensor_meta(source)
            if not isinstance(source, fx.Node) or meta is None:
                break
            if node.target is aten.unsqueeze.default:
                place = int(Op(node).number("dim")) % (meta.dim() + 1)
                if place in (batch_dim, token_dim):
                    break
                batch_dim, token_dim = (dim - (dim > place) for dim in (batch_dim, token_dim))
            elif node.target is aten.expand.default:
                missing = node.meta["val"].dim() - meta.dim()
                batch_dim, token_dim = (max(dim - missing, -1) for dim in (batch_dim, token_dim))
            elif node.target not in COPIES or not (by or meta.dtype == torch.bool):
                break  # a cast makes nothing out of zero, but may make zero out of something
            node = source
        self._made["shown", node, batch_dim, token_dim, by] = [node], lambda x: _where(x[0], batch_dim, token_dim, by)

    def ends(self, head: int, tail: int) -> None:
        """The first and the last rows of every sample."""

        def claim(_: list[Tensor]) -> Tensor:
            at = torch.arange(self.tokens)
            ends: Tensor = (at < head) | (at >= self.tokens - tail)
            return ends

        self._made["ends", head, tail] = [], claim

    def rows(self, samples: fx.Node, tokens: fx.Node) -> None:
        """One row for each pair of two index vectors' elements."""

        def claim(x: list[Tensor]) -> Tensor:
            none = x[0].new_zeros((self.batch, self.tokens), dtype=torch.bool)
            pairs: Tensor = aten.index_put(none, x, none.new_ones(()))
            return pairs

        self._made["rows", samples, tokens] = [samples, tokens], claim

    def build(self, gm: fx.GraphModule, device: torch.device) -> fx.GraphModule:
        """A graph with the inputs of `gm` that returns which rows are real, as a boolean [B N] on `device`."""
        graph = fx.Graph()
        env = {node: graph.node_copy(node) for node in gm.graph.find_nodes(op="placeholder")}
        for node in ancestors([node for nodes, _ in self._made.values() for node in nodes]):
            if flops(node):
                raise PaddingIsRead("mask-is-computed", "what hides the padding is computed by layers itself", node)
            if node not in env:
                env[node] = graph.node_copy(node, env.__getitem__)
        shown = [env[node] for node in env if node.op == "placeholder" and self._shows(node)]
        if not shown:
            raise PaddingIsRead("no-grid", "no input has one row for each token", next(iter(env)))
        claims = [claim for _, claim in self._made.values()]
        seen = [[env[node] for node in nodes] for nodes, _ in self._made.values()]

        def real(seen: list[list[Tensor]], shown: Tensor) -> Tensor:
            result = torch.zeros(self.batch, self.tokens, dtype=torch.bool, device=device)
            for claim, tensors in zip(claims, seen, strict=True):
                result = result | claim(tensors).to(device)
            return result

        graph.output((record(graph, real, (seen, shown[0])),))
        graph.eliminate_dead_code()
        return as_module(gm, graph)

    def _shows(self, node: fx.Node) -> bool:
        meta = tensor_meta(node)
        return meta is not None and all(any(same(s, n) for s in meta.shape) for n in (self.batch, self.tokens))


def _conjuncts(mask: fx.Node) -> list[fx.Node]:
    """Masks such that a query sees a key only if all of them let it."""
    if mask.target is aten.expand.default and isinstance(mask.args[0], fx.Node):
        return _conjuncts(mask.args[0])
    if mask.target in AND:
        parts = [part for part in mask.args if isinstance(part, fx.Node)]
        metas = [meta for part in parts if (meta := tensor_meta(part)) is not None and meta.dtype == torch.bool]
        if len(metas) == 2:
            return [leaf for part in parts for leaf in _conjuncts(part)]
    return [mask]


def _visible(masks: list[Tensor]) -> Tensor:
    """[B|1 M|1] the keys that each of these masks shows to some query of some head.

    A query that an additive mask hides all keys from sees all of them alike, so there they all count.
    """
    result: Any = True
    for x in masks:
        x = x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))  # [B|1 H|1 N|1 M|1]
        if x.dtype != torch.bool:
            x = x > torch.finfo(x.dtype).min / 2
            x = x | ~x.any(-1, keepdim=True)
        result = x.any(2).any(1) & result
    assert isinstance(result, Tensor)
    return result


def _where(x: Tensor, batch_dim: int, token_dim: int, nonzero: bool) -> Tensor:
    """[B|1 N|1] whether anything in a row is zero, or is not."""
    x = x != 0 if nonzero else x == 0
    kept = [dim for dim in (batch_dim, token_dim) if dim >= 0]
    others = [dim for dim in range(x.dim()) if dim not in kept]
    x = x.any(others) if others else x
    x = x.t() if token_dim >= 0 and batch_dim > token_dim else x
    x = x.unsqueeze(0) if batch_dim < 0 else x
    return x.unsqueeze(1) if token_dim < 0 else x
