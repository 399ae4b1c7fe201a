"""Residual joins, `x + f(x)`: an addition of which one operand was computed from the other."""

from __future__ import annotations

import torch
from torch import fx

from tokred.compiler.capture import tensor_meta

__all__ = ["CONTRACTIONS", "joined_to", "residual_of"]

aten = torch.ops.aten
ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}
CONTRACTIONS = {  # x + 0.04 x^3 (an activation) is no residual join: the branch must project or attend
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.matmul.default,
    aten.einsum.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.convolution.default,
    aten.scaled_dot_product_attention.default,
    torch.ops.aten._transformer_encoder_layer_fwd.default,
}


def residual_of(node: fx.Node) -> fx.Node | None:
    """The stream operand `x` of a residual join `x + f(x)`, or None if `node` is no such join."""
    known = node.meta.get("residual_of")
    if known is None or known[0] is not node:  # copying a node copies its meta
        known = node.meta["residual_of"] = (node, _residual_of(node))
    found: fx.Node | None = known[1]
    return found


def joined_to(stream: fx.Node) -> fx.Node | None:
    """The residual join `x + f(x)` of which `stream` is the x; None if there is none."""
    return next((user for user in stream.users if residual_of(user) is stream), None)


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
    """Whether `late` is computed from `early` through a projection or attention; looks no further back than `early`."""
    seen: set[tuple[fx.Node, bool]] = set()
    queue = [(late, False)]
    while queue:
        node, mixed = queue.pop()
        mixed = mixed or node.target in CONTRACTIONS
        for source in node.all_input_nodes:
            if source is early and mixed:
                return True
            if (source, mixed) not in seen and early < source:
                seen.add((source, mixed))
                queue.append((source, mixed))
    return False
