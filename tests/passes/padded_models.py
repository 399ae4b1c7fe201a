"""Encoders as one finds them, and ways to pool what they give: what packing must see through, or leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Masked = Callable[[Tensor], Tensor | None]  # validity [B N] -> the mask that SDPA gets
Pooled = Callable[[Tensor, Tensor], Tensor]  # hidden [B N C], validity [B N] -> a result

WIDTH, HEADS, WORDS = 16, 2, 50


class Encoder(nn.Module):
    """One or two pre-norm blocks; `mask` makes an attention's mask of the validity [B N], `pool` makes the result."""

    def __init__(self, mask: Masked, pool: Pooled, later: Masked | None = None, dropout: float = 0.0, layers: int = 2):
        super().__init__()
        self.masks, self.pool, self.dropout = (mask, later or mask)[:layers], pool, dropout
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.randn(64, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        batch, tokens = ids.shape
        x = self.words(ids) + self.places[:tokens]  # [B N C] + [N C]
        for layer in range(len(self.masks)):
            qkv = self.qkv[layer](self.norms[2 * layer](x)).view(batch, tokens, 3, HEADS, WIDTH // HEADS)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B H N D]
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.masks[layer](valid))
            x = x + F.dropout(self.out[layer](mixed.transpose(1, 2).reshape(batch, tokens, WIDTH)), self.dropout)
            x = x + self.down[layer](F.gelu(self.up[layer](self.norms[2 * layer + 1](x))))
        return self.pool(x, valid)


def boolean(valid: Tensor) -> Tensor:
    return valid[:, None, None, :].bool()


def additive(valid: Tensor) -> Tensor:
    return (1.0 - valid[:, None, None, :].to(torch.float64)) * torch.finfo(torch.float64).min


def infinite(valid: Tensor) -> Tensor:
    return torch.zeros(valid.shape, dtype=torch.float64).masked_fill(valid == 0, float("-inf"))[:, None, None, :]


def causal(valid: Tensor) -> Tensor:
    """[B 1 N N]: keys up to the query, and no padding."""
    n = valid.shape[1]
    return torch.ones(n, n, dtype=torch.bool).tril() & boolean(valid)


def half(valid: Tensor) -> Tensor:
    """Sees a key more at the end than `boolean` does."""
    return boolean(torch.cat([valid[:, 1:], valid[:, :1]], 1) | valid)


def nothing(valid: Tensor) -> None:
    return None


def mean(h: Tensor, valid: Tensor) -> Tensor:
    weight = valid.unsqueeze(-1).expand(h.shape).to(h.dtype)
    return (h * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


def first(h: Tensor, valid: Tensor) -> Tensor:
    return h[:, 0]


def last(h: Tensor, valid: Tensor) -> Tensor:
    return h[:, -1]


def last_valid(h: Tensor, valid: Tensor) -> Tensor:
    """The row of each sample's last real token, as sequence classifiers on decoders read it."""
    at = (torch.arange(h.shape[1]) * valid.long()).argmax(1)
    return h[torch.arange(h.shape[0]), at]


def largest(h: Tensor, valid: Tensor) -> Tensor:
    return h.masked_fill(valid.unsqueeze(-1) == 0, -1e9).amax(1)


def largest_where(h: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid.unsqueeze(-1).bool(), h, -1e9).amax(1)


def rows_and_mean(h: Tensor, valid: Tensor) -> Any:
    """Rows are returned, with zeros at the padding."""
    return h * valid.unsqueeze(-1), mean(h, valid)


def all_rows(h: Tensor, valid: Tensor) -> Tensor:
    return h


def plain_mean(h: Tensor, valid: Tensor) -> Tensor:
    return h.mean(1)


def plain_max(h: Tensor, valid: Tensor) -> Tensor:
    return h.amax(1)


def everything_but_first(h: Tensor, valid: Tensor) -> Tensor:
    return h[:, 1:].sum(1)


def weighted_by_features(h: Tensor, valid: Tensor) -> Tensor:
    """A product with what is no mask: it says nothing about rows."""
    return (h * torch.arange(h.shape[-1])).sum(1)
