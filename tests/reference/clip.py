"""transformers CLIP vision (class token) and SigLIP vision (no class token, attention-pooling head)."""

from __future__ import annotations

from torch import Tensor, nn

from .driver import Block, Method, encode, merge_heads, probabilities, split_heads


def block(layer: nn.Module) -> Block:
    attention = layer.self_attn
    heads = attention.num_heads

    def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = layer.layer_norm1(x)
        q, k, v = attention.q_proj(h), attention.k_proj(h), attention.v_proj(h)
        return split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)

    return Block(
        scale=attention.scale,
        qkv=qkv,
        join=lambda x, out: x + attention.out_proj(out),
        mlp=lambda x: x + layer.mlp(layer.layer_norm2(x)),
    )


def side(model: nn.Module) -> int:
    return int(model.config.image_size // model.config.patch_size)


def clip_vision(model: nn.Module, pixels: Tensor, method: Method | None) -> dict[str, Tensor]:
    x = model.pre_layrnorm(model.embeddings(pixels))
    blocks = [block(layer) for layer in model.encoder.layers]
    t = encode(x, blocks, method, head=1, grid=(side(model), side(model)))
    return {"last_hidden_state": t.full(t.x), "pooler_output": model.post_layernorm(t.x[:, 0])}


def siglip_vision(model: nn.Module, pixels: Tensor, method: Method | None) -> dict[str, Tensor]:
    blocks = [block(layer) for layer in model.encoder.layers]
    t = encode(model.embeddings(pixels), blocks, method, head=0, grid=(side(model), side(model)))
    y = model.post_layernorm(t.x)
    return {"last_hidden_state": t.full(y), "pooler_output": probe(model.head, y, t.bias())}


def probe(head: nn.Module, y: Tensor, bias: Tensor | float) -> Tensor:
    """SigLIP's pooling head: one learned query attends to the (reduced) tokens."""
    mha = head.attention
    width, heads = mha.embed_dim, mha.num_heads
    wq, wk, wv = mha.in_proj_weight.split(width)
    bq, bk, bv = mha.in_proj_bias.split(width)
    q = split_heads(head.probe.expand(y.shape[0], -1, -1) @ wq.T + bq, heads)
    k, v = split_heads(y @ wk.T + bk, heads), split_heads(y @ wv.T + bv, heads)
    x = mha.out_proj(merge_heads(probabilities(q, k, (width // heads) ** -0.5, bias) @ v))
    return (x + head.mlp(head.layernorm(x)))[:, 0]
