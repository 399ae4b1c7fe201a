"""transformers ViT and DeiT (class token, and DeiT's distillation token)."""

from __future__ import annotations

from torch import Tensor, nn

from .driver import Block, Method, Tokens, encode, split_heads


def block(layer: nn.Module) -> Block:
    attention = layer.attention
    heads = attention.num_attention_heads

    def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = layer.layernorm_before(x)
        q, k, v = attention.q_proj(h), attention.k_proj(h), attention.v_proj(h)
        return split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)

    return Block(
        scale=attention.scaling,
        qkv=qkv,
        join=lambda x, out: x + attention.o_proj(out),
        mlp=lambda x: x + layer.mlp(layer.layernorm_after(x)),
    )


def tokens(base: nn.Module, pixels: Tensor, method: Method | None, head: int) -> Tokens:
    side = base.config.image_size // base.config.patch_size
    return encode(base.embeddings(pixels), [block(layer) for layer in base.layers], method, head, grid=(side, side))


def vit_model(model: nn.Module, pixels: Tensor, method: Method | None) -> dict[str, Tensor]:
    t = tokens(model, pixels, method, head=1)
    y = model.layernorm(t.x)
    out = {"last_hidden_state": t.full(y)}
    if model.pooler is not None:
        out["pooler_output"] = model.pooler(y)
    return out


def vit_classifier(model: nn.Module, pixels: Tensor, method: Method | None) -> dict[str, Tensor]:
    t = tokens(model.vit, pixels, method, head=1)
    return {"logits": model.classifier(model.vit.layernorm(t.x)[:, 0])}


def deit_with_teacher(model: nn.Module, pixels: Tensor, method: Method | None) -> dict[str, Tensor]:
    t = tokens(model.deit, pixels, method, head=2)
    y = model.deit.layernorm(t.x)
    logits, distilled = model.cls_classifier(y[:, 0]), model.distillation_classifier(y[:, 1])
    return {"logits": (logits + distilled) / 2, "cls_logits": logits, "distillation_logits": distilled}
