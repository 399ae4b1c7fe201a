"""Run an encoder block by block, in plain torch, with a reduction after each attention residual.

A model family says how its blocks are made (`Block`); a method says what one reduction does (`Cut`). Both are
small; everything they share is here. README.md holds the definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """One transformer block as plain functions. `stream` is the residual stream, [B N C]."""

    scale: float
    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # stream -> q, k, v, each [B H N D]
    join: Callable[[Tensor, Tensor], Tensor]  # stream, attention output [B N H*D] -> stream
    mlp: Callable[[Tensor], Tensor]  # stream -> stream, norm and residual included


@dataclass(frozen=True)
class Site:
    """What a method may look at: the stream after the attention residual of block `layer`, and that attention."""

    layer: int
    layers: int
    x: Tensor  # [B N C]
    k: Tensor  # [B H N D]
    probs: Tensor  # [B H N N]
    sizes: Tensor  # [B N]
    head: int
    tail: int
    grid: tuple[int, int] | None

    @property
    def cosine(self) -> Tensor:
        """[B N N], from the keys averaged over the heads."""
        metric = self.k.mean(dim=1)
        metric = metric / metric.norm(dim=-1, keepdim=True)
        return metric @ metric.transpose(1, 2)


@dataclass(frozen=True)
class Cut:
    """What one reduction gives: the new tokens, their sizes, and how to go back."""

    x: Tensor  # [B N' C]
    sizes: Tensor  # [B N']
    restore: Tensor  # [B N N'], rows sum to 1


class Method(Protocol):
    @property
    def prop_attn(self) -> bool: ...

    def cut(self, site: Site) -> Cut | None: ...


@dataclass(frozen=True)
class Tokens:
    """The stream after the last block, before the final norm."""

    x: Tensor  # [B N C]
    sizes: Tensor  # [B N]
    restore: Tensor  # [B N0 N]
    prop_attn: bool
    counts: list[int]  # tokens that each block's MLP saw

    def full(self, y: Tensor) -> Tensor:
        """Per-token results [B N C], one for each original token [B N0 C]."""
        return self.restore @ y

    def bias(self) -> Tensor | float:
        """What is added to the scores of whoever attends to these tokens: [B 1 1 N], or nothing."""
        return self.sizes.log()[:, None, None, :] if self.prop_attn else 0.0


def split_heads(x: Tensor, heads: int) -> Tensor:
    batch, n, _ = x.shape
    return x.view(batch, n, heads, -1).transpose(1, 2)  # [B N H*D] -> [B H N D]


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [B H N D] -> [B N H*D]


def probabilities(q: Tensor, k: Tensor, scale: float, bias: Tensor | float = 0.0) -> Tensor:
    return (q @ k.transpose(-2, -1) * scale + bias).softmax(dim=-1)


def encode(
    x: Tensor,
    blocks: Sequence[Block],
    method: Method | None,
    head: int,
    tail: int = 0,
    grid: tuple[int, int] | None = None,
) -> Tokens:
    batch, n, _ = x.shape
    sizes = x.new_ones(batch, n)
    restore = torch.eye(n, dtype=x.dtype).expand(batch, n, n)
    prop_attn = method is not None and method.prop_attn
    counts = []
    for layer, block in enumerate(blocks):
        q, k, v = block.qkv(x)
        bias = sizes.log()[:, None, None, :] if prop_attn else 0.0
        probs = probabilities(q, k, block.scale, bias)
        x = block.join(x, merge_heads(probs @ v))
        if method is not None:
            site = Site(layer, len(blocks), x, k, probs, sizes, head, tail, grid)
            cut = method.cut(site)
            if cut is not None:
                x, sizes, restore = cut.x, cut.sizes, restore @ cut.restore
        counts.append(x.shape[1])
        x = block.mlp(x)
    return Tokens(x, sizes, restore, prop_attn, counts)
