"""Residual joins, `x + f(x)`: an addition of which one operand was computed from the other."""

from __future__ import annotations

import torch
from torch import fx

from tokred.compiler.capture import tensor_meta

__all__ = ["residual_of"]

aten = torch.ops.aten
ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}


def residual_of(node: fx.Node) -> fx.Node | None:
    """The stream operand `x` of a residual join `x + f(x)`, or None if `node` is no such join."""
    if "residual_of" not in node.meta:
        node.meta["residual_of"] = _residual_of(node)
    found: fx.Node | None = node.meta["residual_of"]
    return found


def _residual_of(node: fx.Node) -> fx.Node | None:
    if node.target not in ADDITIONS or len(node.args) < 2:
        return None
    a, b = node.args[0], node.args[1]
    left, right = tensor_meta(a), tensor_meta(b)
    if left is None or right is None or left.dim() < 2 or left.shape != right.shape:
        return None
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    if a is not b and _comes_from(b, a):
        return a
    if a is not b and _comes_from(a, b):
        return b
    return None


def _comes_from(late: fx.Node, early: fx.Node) -> bool:
    """Whether `early` is an ancestor of `late`; looks no further back than `early` itself."""
    seen = {late}
    queue = [late]
    while queue:
        node = queue.pop()
        for source in node.all_input_nodes:
            if source is early:
                return True
            if source not in seen and early < source:
                seen.add(source)
                queue.append(source)
    return False
