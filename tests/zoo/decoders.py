"""Text decoders, for recognition and the exact passes: merging would leak the future."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from tests.zoo.architecture import Architecture, Inputs, tokens
from tests.zoo.text import SIZES
from tests.zoo.vision import TOWER

LENGTH = 24
WORDS: dict[str, Any] = SIZES | {
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "num_key_value_heads": 2,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _decoder(name: str, build: Any, *tags: str, **fields: Any) -> Architecture:
    known = {"inputs": tokens(LENGTH), "attention": 3, "mlp": 3, "self_attention_tokens": (LENGTH,)} | fields
    return Architecture(name, build, tags=frozenset({"text", "causal", "decoder", *tags}), **known)


def _gpt2() -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=99,
        n_positions=64,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_inner=128,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hf.GPT2LMHeadModel(config)


def _llava() -> nn.Module:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**dict(TOWER, num_hidden_layers=3)),
        text_config=hf.LlamaConfig(**dict(WORDS, num_hidden_layers=3, max_position_embeddings=128)),
        image_token_index=98,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return hf.LlavaForConditionalGeneration(config)


def _llava_inputs(batch: int) -> Inputs:
    ids = torch.randint(5, 96, (batch, 60))
    ids[:, 3:52] = 98  # 49 image tokens
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 3, 56, 56),
        "use_cache": False,
    }


GEMMA: dict[str, Any] = WORDS | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}

ARCHITECTURES = (
    _decoder("gpt2", _gpt2, why="Conv1D: addmm on [B*N C]"),
    _decoder("llama", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS)), why="rotary, grouped heads expanded"),
    _decoder("llama_padded", lambda: hf.LlamaModel(hf.LlamaConfig(**WORDS)), inputs=tokens(LENGTH, padding=7)),
    _decoder(
        "llama_no_mask",
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS)),
        inputs=tokens(LENGTH, mask=False),
        why="is_causal and enable_gqa instead of a mask",
    ),
    _decoder(
        "mistral",
        lambda: hf.MistralForCausalLM(hf.MistralConfig(**WORDS, sliding_window=8)),
        why="a window of 8 in the mask",
    ),
    _decoder("qwen2", lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**WORDS)), why="biased q, k, v"),
    _decoder(
        "qwen3",
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**WORDS, head_dim=16)),
        why="q and k normalised before rotary",
    ),
    _decoder(
        "gemma2",
        lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA)),
        why="tanh soft cap on the scores; norms after blocks",
    ),
    _decoder(
        "gemma3",
        lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA)),
        why="local and global layers with tables of their own",
    ),
    _decoder("phi3", lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**WORDS)), why="packed qkv and packed gate-up"),
    _decoder(
        "olmo2", lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**WORDS)), why="norm after the block, before the residual"
    ),
    _decoder(
        "mixtral",
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**WORDS, num_local_experts=4, num_experts_per_tok=2)),
        why="routed experts",
        float64=False,
    ),
    _decoder(
        "qwen3_moe",
        lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(
                **WORDS,
                head_dim=16,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=64,
                mlp_only_layers=[1],
                norm_topk_prob=True,
            )
        ),
        why="routed experts in all layers but one",
        float64=False,
    ),
    _decoder(
        "llava",
        _llava,
        "vision",
        "breaks",
        inputs=_llava_inputs,
        attention=6,
        mlp=6,
        self_attention_tokens=(50, 60),
        why="image features scattered into the prompt; counting image tokens breaks the graph",
    ),
)
