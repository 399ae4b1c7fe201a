"""Nested learners as one operator: of N small MLPs each row gets the sum of the first few, of as many as it needs.

How many differs from row to row, and only the data tell, but the result has a static shape. On CPU rows are sorted by
their number, so that each learner runs on the first rows alone and reads its weights only if one of these needs it;
elsewhere everything is computed and masked, because sizes that depend on data would wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "masked_learners", "nested_learners"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def masked_learners(
    x: Tensor, count: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, activation: str
) -> Tensor:
    """The definition: [T C], for each row the sum over the learners n < count of act(x up[n]^T + up_bias[n]) down[n] +
    down_bias[n].

    x [T C], count [T] integers in 0..N, up and down [N F C], up_bias [N F], down_bias [N C].
    """
    learners, neurons = up_bias.shape
    wanted = count.unsqueeze(1) > torch.arange(learners, device=count.device)  # [T N]
    hidden = ACTIVATIONS[activation](F.linear(x, up.flatten(0, 1), up_bias.flatten()))  # [T N*F]
    open_ = wanted.unsqueeze(2).expand(-1, -1, neurons).flatten(1)
    return torch.where(open_, hidden, 0.0) @ down.flatten(0, 1) + wanted.to(x.dtype) @ down_bias


def _by_rows(
    x: Tensor, count: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, activation: str
) -> Tensor:
    order = count.argsort(descending=True)
    rows, sums = x[order], torch.zeros_like(x)
    for learner in range(len(up)):
        wanted = int((count > learner).sum())
        if wanted == 0:
            break
        hidden = ACTIVATIONS[activation](F.linear(rows[:wanted], up[learner], up_bias[learner]))
        sums[:wanted] += torch.addmm(down_bias[learner], hidden, down[learner])
    return torch.empty_like(x).index_copy(0, order, sums)


_library = torch.library.Library("tokred", "FRAGMENT")
_library.define(
    "nested_learners(Tensor x, Tensor count, Tensor up, Tensor up_bias, Tensor down, Tensor down_bias, "
    "str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("nested_learners", masked_learners, "CompositeExplicitAutograd")
_library.impl("nested_learners", _by_rows, "CPU")

nested_learners = torch.ops.tokred.nested_learners.default
"""`masked_learners` as one node of a graph. No gradients: these are of the definition."""


@torch.library.register_fake("tokred::nested_learners", lib=_library)
def _(
    x: Tensor, count: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, activation: str
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
