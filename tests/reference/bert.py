"""transformers BERT: post-norm blocks, no padding."""

from __future__ import annotations

from torch import Tensor, nn

from .driver import Block, Method, Tokens, encode, split_heads


def block(layer: nn.Module) -> Block:
    attention, output = layer.attention.self, layer.attention.output
    heads = attention.num_attention_heads

    def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = attention.query(x), attention.key(x), attention.value(x)
        return split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)

    return Block(
        scale=attention.attention_head_size**-0.5,
        qkv=qkv,
        join=lambda x, out: output.LayerNorm(output.dense(out) + x),
        mlp=lambda x: layer.output.LayerNorm(layer.output.dense(layer.intermediate(x)) + x),
    )


def tokens(base: nn.Module, ids: Tensor, method: Method | None) -> Tokens:
    return encode(base.embeddings(ids), [block(layer) for layer in base.encoder.layer], method, head=1)


def bert_model(model: nn.Module, ids: Tensor, method: Method | None) -> dict[str, Tensor]:
    t = tokens(model, ids, method)
    return {"last_hidden_state": t.full(t.x), "pooler_output": model.pooler(t.x)}


def bert_classifier(model: nn.Module, ids: Tensor, method: Method | None) -> dict[str, Tensor]:
    t = tokens(model.bert, ids, method)
    return {"logits": model.classifier(model.bert.pooler(t.x))}
