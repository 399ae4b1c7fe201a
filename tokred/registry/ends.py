"""The map of token liveness: the rows at the ends survive, the same for every sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokred.registry.maps import TokenMap

__all__ = ["Ends"]


@dataclass(frozen=True)
class Ends(TokenMap):
    """The first `head` and the last `tail` rows. Exact where nobody reads the others, and only used there."""

    head: int
    tail: int
    prop_attn: bool = False
    per_sample: ClassVar[bool] = False

    def reduce(self, x: Tensor) -> Tensor:
        parts = [x[:, : self.head]] if self.head else []
        parts += [x[:, x.shape[1] - self.tail :]] if self.tail else []
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def pull(self, weight: Tensor) -> Tensor:
        return self.reduce(weight)

    pick = any = reduce

    def window(self, lo: int, hi: int, length: Any) -> Ends:
        return Ends(self.head - lo, self.tail - hi)

    @property
    def restorable(self) -> bool:
        return False


torch.utils._pytree.register_pytree_node(
    Ends, lambda ends: ([], (ends.head, ends.tail)), lambda _, ends: Ends(*ends), serialized_type_name="tokred.Ends"
)
