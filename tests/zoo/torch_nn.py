"""torch.nn's own transformer modules, and attention written by hand the ways people write it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.architecture import Architecture, Inputs

LENGTH = 40


def _stream(name: str) -> Any:
    return lambda batch: {name: torch.randn(batch, LENGTH, 64)}


def _padded(batch: int) -> Inputs:
    padding = torch.zeros(batch, LENGTH, dtype=torch.bool)
    padding[1:, 30:] = True
    return {"src": torch.randn(batch, LENGTH, 64), "src_key_padding_mask": padding}


def _encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


class _MhaBlock(nn.Module):
    """A pre-norm block around nn.MultiheadAttention, and a mean over tokens."""

    def __init__(self, weights: bool, sequence_first: bool = False) -> None:
        super().__init__()
        self.weights, self.sequence_first = weights, sequence_first
        self.norm1, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=not sequence_first)
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence_first:
            x = x.transpose(0, 1)  # [N B C]
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=self.weights)[0]
        x = x + self.mlp(self.norm2(x))
        return x.mean(0 if self.sequence_first else 1)


class _EinsumBlock(nn.Module):
    """Attention in einsum notation with an explicit scale, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (linear(y).unflatten(-1, (4, 16)) for linear in (self.q, self.k, self.v))  # [B N H D]
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).div(4.0).softmax(-1)
        x = x + self.out(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(-2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class _Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_EinsumBlock() for _ in range(3))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


class _Cross(nn.Module):
    """nn.Transformer: an encoder, and a decoder whose targets attend to themselves and to the encoder's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Transformer(64, 4, 2, 2, 128, dropout=0.0, batch_first=True)
        self.register_buffer("causal", torch.full((24, 24), float("-inf")).triu(1))

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        out: Tensor = self.model(src, tgt, tgt_mask=self.causal, tgt_is_causal=True)
        return out


def _torch(name: str, build: Any, *tags: str, **fields: Any) -> Architecture:
    known = {"inputs": _stream("src"), "attention": 3, "mlp": 3, "self_attention_tokens": (LENGTH,)} | fields
    return Architecture(f"nn_{name}", build, tags=frozenset({"text", *tags}), **known)


ARCHITECTURES = (
    _torch("encoder_fast", _encoder, "fused", why="eval mode: one fused operator a layer"),
    _torch("encoder_fast_padded", _encoder, "fused", inputs=_padded, why="the fused operator with a padding mask"),
    _torch(
        "encoder_fast_prenorm",
        lambda: _encoder(norm_first=True, activation="gelu"),
        "fused",
        why="fused, norm first, GELU",
    ),
    _torch("encoder_train", _encoder, training=True, why="train mode: F.multi_head_attention_forward"),
    _torch("encoder_train_padded", _encoder, inputs=_padded, training=True, why="train mode with a padding mask"),
    _torch(
        "transformer",
        _Cross,
        inputs=lambda batch: _stream("src")(batch) | {"tgt": torch.randn(batch, 24, 64)},
        attention=6,
        mlp=4,
        self_attention_tokens=(LENGTH, 24),
        why="encoder and decoder, cross attention",
    ),
    _torch(
        "mha_block",
        lambda: _MhaBlock(weights=False),
        inputs=_stream("x"),
        attention=1,
        mlp=1,
        training=True,
        why="nn.MultiheadAttention",
    ),
    _torch(
        "mha_weights",
        lambda: _MhaBlock(weights=True),
        inputs=_stream("x"),
        attention=1,
        mlp=1,
        why="need_weights: bmm, softmax, bmm",
    ),
    _torch(
        "mha_sequence_first",
        lambda: _MhaBlock(weights=False, sequence_first=True),
        inputs=_stream("x"),
        attention=1,
        mlp=1,
        training=True,
        why="tokens on axis 0",
    ),
    _torch("einsum", _Einsum, inputs=_stream("x"), why="einsum spelling"),
)
