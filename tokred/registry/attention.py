"""The base of methods that compute an attention in another way and leave everything around it alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tokred.registry.method import Method

__all__ = ["AttentionRewrite", "Effort"]


@dataclass(frozen=True)
class Effort:
    """What one head of one sample costs where a method computes its attention.

    attended  pairs of a query and a key, in q k^T and in the product with v
    compared  pairs in q k^T alone, to choose what attends
    moved     numbers that are read and written beside the products
    kernels   calls, for all heads of a sample together
    """

    attended: float
    compared: float = 0
    moved: float = 0
    kernels: int = 1


@dataclass(frozen=True, kw_only=True)
class AttentionRewrite(Method):
    """Another way to compute causal self-attention: every token comes in and goes out, so stream, KV caches, masks,
    positions and MLPs stay as they are.

    assumes  what predictions take for granted where the data decides
    """

    assumes: ClassVar[str] = ""

    @property
    def shortest(self) -> int | None:
        """The fewest tokens of which it leaves any out; None where its options leave nothing out at all."""
        raise NotImplementedError

    def effort(self, tokens: int, channels: int) -> Effort:
        """What it costs, for the report and the gate: numbers only, called before anything is traced."""
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: Any) -> Tensor:
        """[B H N E] from query [B H N D], key [B G N D] and value [B G N E], G <= H: plain code, traced into the graph.

        mask   [B|1 1|H N N] boolean or additive; None hides later keys alone
        scale  the factor on q k^T; None is 1 / sqrt(D)
        """
        raise NotImplementedError
