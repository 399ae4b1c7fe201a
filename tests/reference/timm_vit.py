"""timm's VisionTransformer: class token or average pooling, and the distilled DeiT with two heads."""

from __future__ import annotations

from torch import Tensor, nn

from .driver import Block, Method, encode


def block(layer: nn.Module) -> Block:
    attention = layer.attn

    def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, n, _ = x.shape
        packed = attention.qkv(layer.norm1(x)).view(batch, n, 3, attention.num_heads, attention.head_dim)
        q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
        return attention.q_norm(q), attention.k_norm(k), v

    return Block(
        scale=attention.scale,
        qkv=qkv,
        join=lambda x, out: x + layer.ls1(attention.proj(attention.norm(out))),
        mlp=lambda x: x + layer.ls2(layer.mlp(layer.norm2(x))),
    )


def timm_vit(model: nn.Module, pixels: Tensor, method: Method | None) -> dict[str, Tensor]:
    x = model.norm_pre(model._pos_embed(model.patch_embed(pixels)))
    prefix = model.num_prefix_tokens
    t = encode(x, [block(layer) for layer in model.blocks], method, prefix, grid=model.patch_embed.grid_size)
    y = model.norm(t.x)
    if hasattr(model, "head_dist"):
        return {"logits": (model.head(y[:, 0]) + model.head_dist(y[:, 1])) / 2}
    pooled = t.full(y)[:, prefix:].mean(dim=1) if model.global_pool == "avg" else y[:, 0]
    return {"logits": model.head(model.fc_norm(pooled))}
