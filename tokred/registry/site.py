"""What a method sees: the place (plain numbers) and the site (the place with its tensors). Never a graph or a model."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from tokred.registry.maps import Keep, partition

__all__ = ["Place", "Site", "precise"]


def precise(x: Tensor) -> Tensor:
    """In float32 or better, for scores whose order decides."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a method may act: numbers only, known before anything is traced.

    layer   number of this attention block on its token axis, from 0
    depth   how many attention blocks that axis has
    tokens  N, before this site
    head    protected tokens at the front, which keep their rows (class, distillation, registers)
    tail    the same at the back
    grid    rows and columns of the patches between head and tail, where they still form a grid
    """

    layer: int
    depth: int
    tokens: Any
    head: int = 0
    tail: int = 0
    grid: tuple[int, int] | None = None

    @property
    def free(self) -> Any:
        """How many tokens are not protected."""
        return self.tokens - self.head - self.tail

    def count(self, keep: float) -> Any:
        """How many unprotected tokens stay if the fraction `keep` of them does, rounded up as EViT does."""
        return ceil(keep * self.free - 1e-9)


@dataclass(frozen=True, kw_only=True)
class Site(Place):
    """A place with its tensors.

    hidden  [B N C]    the residual stream after the attention residual (round trips: what enters the attention)
    query   [B H N D]  as they enter q k^T, None where the method did not declare that it needs them
    key     [B G N D]  G <= H heads: grouped queries are not expanded
    value   [B G N D]
    size    [B N]      how many original tokens each row stands for, None while all are 1
    valid   [B N]      False for padding, None where nothing is masked
    mask    [B|1 1|H 1|N N] the attention's own mask, boolean or additive, or None
    scale              the factor on q k^T
    """

    hidden: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    size: Tensor | None = None
    valid: Tensor | None = None
    mask: Tensor | None = None
    scale: Any = None

    @property
    def batch(self) -> Any:
        return self.hidden.shape[0]

    def arange(self, start: Any, stop: Any, step: int = 1) -> Tensor:
        """Row numbers [B ..], the same for every sample."""
        return torch.arange(start, stop, step, device=self.hidden.device).expand(self.batch, -1)

    def sizes(self) -> Tensor:
        """[B N] how many original tokens each row stands for; padding stands for none."""
        return self.members() if self.size is None else self.size

    def members(self) -> Tensor:
        """[B N] one for each row, however many tokens it stands for; padding is none."""
        dtype = torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
        if self.valid is not None:
            return self.valid.to(dtype).expand(self.batch, -1)
        return torch.ones((self.batch, self.tokens), dtype=dtype, device=self.hidden.device)

    def metric(self) -> Tensor:
        """[B N D] the mean of the keys over heads, each row of length one (ToMe, section 3)."""
        assert self.key is not None
        mean = self.key.mean(1)
        length: Tensor = mean.norm(dim=-1, keepdim=True)
        return mean / length

    def attention(self, row: int = 0) -> Tensor:
        """[B H N] the attention of one query row, in float32 or better, masked and scaled as the model's own."""
        assert self.query is not None and self.key is not None
        query = self.query[:, :, row]  # [B H D]
        groups = self.key.shape[1]
        query = query.unflatten(1, (groups, -1))  # [B G H/G D]
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = (query @ self.key.transpose(-1, -2)).flatten(1, 2) * scale  # [B H N]
        scores = precise(scores)
        if self.mask is not None:
            mask = self.mask[:, :, min(row, self.mask.shape[2] - 1)]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if self.size is not None and self.prop_attn:
            scores = scores + self.size.clamp(min=1e-6).log().unsqueeze(1)
        return scores.softmax(-1)

    prop_attn: bool = False  # whether the model's own attention weighs keys by size at this site

    def keep_top(self, score: Tensor, count: Any) -> Keep:
        """Keep the `count` unprotected rows with the largest score [B N], in their order, and all protected ones."""
        free = score[:, self.head : self.tokens - self.tail]
        if self.valid is not None:  # padding goes first
            valid = self.valid[:, self.head : self.tokens - self.tail]
            free = free.masked_fill(~valid, -torch.inf)
        chosen, _ = partition(free.topk(count, dim=1).indices, free.shape[1])
        return Keep(self.with_protected(chosen + self.head))

    def with_protected(self, rows: Tensor) -> Tensor:
        """[B K'] row numbers of unprotected tokens -> [B K] with the head in front and the tail behind."""
        parts = [rows]
        if self.head:
            parts.insert(0, self.arange(0, self.head))
        if self.tail:
            parts.append(self.arange(self.tokens - self.tail, self.tokens))
        return torch.cat(parts, 1) if len(parts) > 1 else rows
