"""Routed experts as one operator: each row goes through the gated MLPs of its own experts, whatever the others do.

transformers sorts the pairs of row and expert by expert, multiplies group by group and undoes the sort. Seen op by op
that mixes all rows; seen as a whole it mixes none. The operator is that sequence under one name: it is composite, so
whoever lowers it sees the sort, the grouped products and their gradients as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "routed_experts"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}

_library = torch.library.Library("tokred", "FRAGMENT")
_library.define(
    "routed_experts(Tensor rows, Tensor experts, Tensor up, Tensor down, str activation, str product) -> Tensor"
)


def _routed_experts(rows: Tensor, experts: Tensor, up: Tensor, down: Tensor, activation: str, product: str) -> Tensor:
    """rows [T C], experts [T K] of E, up [E C 2*F], down [E F D] -> [T K D].

    out[t, k] = (act(g) * u) @ down[e], where g, u = rows[t] @ up[e] and e = experts[t, k]. `product` names the grouped
    matrix product: (rows sorted by group, one matrix a group, where each group ends).
    """
    namespace, name = product.split("::")
    grouped: Any = getattr(getattr(torch.ops, namespace), name).default
    count, choices = up.shape[0], experts.shape[1]
    chosen, order = experts.reshape(-1).sort()
    histogram = chosen.float() if chosen.device.type in ("cpu", "mps") else chosen.int()  # what histc takes there
    ends = torch.histc(histogram, bins=count, min=0, max=count - 1).cumsum(0, dtype=torch.int32)
    gate, value = grouped(rows[order // choices], up, ends).chunk(2, -1)  # [T*K F] twice
    out: Tensor = grouped(ACTIVATIONS[activation](gate) * value, down, ends)
    places = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    return out[places].view(rows.shape[0], choices, -1)


_library.impl("routed_experts", _routed_experts, "CompositeImplicitAutograd")
routed_experts: Any = torch.ops.tokred.routed_experts.default
