"""Positions that rotary tables hold, and whether kept tokens can be numbered anew behind a cut.

Rotary attention sees nothing of two positions but their difference. So K kept tokens of N may take the last K rows of
the model's own tables, numbers N-K to N-1, in place of 0 to K-1, with the same result: what is generated afterwards
goes on at N, right behind them, in layers that lost many tokens and in layers that lost none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokred.compiler.attention import Attention
from tokred.compiler.capture import is_parameter, tensor_meta
from tokred.compiler.causal import hides_earlier_keys
from tokred.compiler.relations import same
from tokred.compiler.residual import CONTRACTIONS

__all__ = ["CODE", "Positions"]

CODE = "compact-positions"

aten = torch.ops.aten

ANGLES = {aten.cos.default, aten.sin.default}
PROJECTIONS = {aten.linear.default, aten.addmm.default, aten.scaled_dot_product_attention.default}


class Positions:
    """The rotary tables of a graph: `tables` are nodes computed from cosines or sines and from no token's features."""

    def __init__(self, gm: fx.GraphModule):
        self.tables: set[fx.Node] = set()
        features: set[fx.Node] = set()
        for node in gm.graph.nodes:
            inputs = node.all_input_nodes
            if _is_feature(node) or any(source in features for source in inputs):
                features.add(node)
            elif node.target in ANGLES or any(source in self.tables for source in inputs):
                self.tables.add(node)
        self.turned = {node for node in features if any(source in self.tables for source in node.all_input_nodes)}

    def turning(self, block: Attention) -> list[fx.Node]:
        """What multiplies a block's queries and keys with rotary tables; empty unless both are."""
        queries, keys = (self._behind(node) for node in (block.query, block.key))
        return sorted(queries | keys) if queries and keys else []

    def _behind(self, node: fx.Node) -> set[fx.Node]:
        found, seen, queue = set(), {node}, [node]
        while queue:
            node = queue.pop()
            if node in self.turned:
                found.add(node)
            elif node.target not in CONTRACTIONS:
                queue += [source for source in node.all_input_nodes if source not in seen]
                seen.update(queue)
        return found

    def numbers(self, block: Attention) -> fx.Node | None:
        """[B|1 N] or [N] the positions that a block's tables were computed from; None where a token has several."""
        queue = [table for node in self.turning(block) for table in node.all_input_nodes if table in self.tables]
        seen, found = set(queue), set()
        while queue:
            node = queue.pop()
            meta = tensor_meta(node)
            numbers = meta is not None and meta.dtype == torch.int64 and meta.dim() in (1, 2)
            if numbers and same(meta.shape[-1], block.tokens):  # type: ignore[union-attr]
                found.add(node)
            elif node.op == "placeholder" and not is_parameter(node) and meta is not None and meta.dim() > 0:
                return None  # numbers of another shape, such as three for each token
            else:
                queue += [source for source in node.all_input_nodes if source not in seen]
                seen.update(queue)
        return found.pop() if len(found) == 1 else None

    def fixed(self, blocks: list[Attention]) -> str:
        """Why the tokens that reach these attentions cannot be numbered anew; empty where they can."""
        for block in blocks:
            where = f"in layer {block.layer}"
            if hides_earlier_keys(block):
                return f"{where} a window or a bias counts the tokens between two others, dropped ones too"
            if not self.turning(block):
                return f"no rotary table shows {where}, and positions that were added to the tokens stay what they are"
            if self.numbers(block) is None:
                return f"the positions {where} are not one number for each token"
        return ""


def _is_feature(node: fx.Node) -> bool:
    """Whether what a token holds comes into the graph here."""
    if node.op == "placeholder":
        meta: Any = tensor_meta(node)
        return meta is not None and meta.dtype.is_floating_point and not is_parameter(node)
    return node.target in PROJECTIONS or node.target is aten.embedding.default
