"""transformers DINOv2, without and with register tokens: layer scale, class token, mean-pooled patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .driver import Block, Method, Tokens, encode, split_heads


def block(layer: nn.Module) -> Block:
    attention = layer.attention
    heads = attention.num_attention_heads

    def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = layer.norm1(x)
        q, k, v = attention.q_proj(h), attention.k_proj(h), attention.v_proj(h)
        return split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)

    return Block(
        scale=attention.scaling,
        qkv=qkv,
        join=lambda x, out: x + layer.layer_scale1(attention.o_proj(out)),
        mlp=lambda x: x + layer.layer_scale2(layer.mlp(layer.norm2(x))),
    )


def protected(base: nn.Module) -> int:
    return 1 + getattr(base.config, "num_register_tokens", 0)


def tokens(base: nn.Module, pixels: Tensor, method: Method | None) -> Tokens:
    grid = (pixels.shape[2] // base.config.patch_size, pixels.shape[3] // base.config.patch_size)
    blocks = [block(layer) for layer in base.encoder.layer]
    return encode(base.embeddings(pixels), blocks, method, protected(base), grid=grid)


def dinov2_model(model: nn.Module, pixels: Tensor, method: Method | None) -> dict[str, Tensor]:
    t = tokens(model, pixels, method)
    y = model.layernorm(t.x)
    return {"last_hidden_state": t.full(y), "pooler_output": y[:, 0]}


def dinov2_classifier(model: nn.Module, pixels: Tensor, method: Method | None) -> dict[str, Tensor]:
    base = model.dinov2 if hasattr(model, "dinov2") else model.dinov2_with_registers
    t = tokens(base, pixels, method)
    y = base.layernorm(t.x)
    patches = t.full(y)[:, protected(base) :].mean(dim=1)
    return {"logits": model.classifier(torch.cat([y[:, 0], patches], dim=1))}
