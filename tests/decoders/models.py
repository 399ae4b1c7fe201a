"""Small decoders with random weights, and batches of prompts of different lengths, padded on the left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

__all__ = ["DECODERS", "IMAGE", "LENGTH", "SPAN", "VLMS", "build", "prompts"]

LENGTH, SPAN = 26, (9, 21)  # tokens of a prompt, padding included; the rows that stand for an image
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}

DECODERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "llama": lambda sizes: hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)),
    "mistral": lambda sizes: hf.MistralForCausalLM(hf.MistralConfig(**sizes, sliding_window=64)),
    "qwen2": lambda sizes: hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes)),
    "qwen3": lambda sizes: hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes, head_dim=16)),
    "gemma3": lambda sizes: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA | sizes)),
    "phi3": lambda sizes: hf.Phi3ForCausalLM(hf.Phi3Config(**sizes)),
    "olmo2": lambda sizes: hf.Olmo2ForCausalLM(hf.Olmo2Config(**sizes)),
    "gpt2": lambda sizes: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=99,
            n_positions=128,
            n_embd=64,
            n_layer=sizes["num_hidden_layers"],
            n_head=4,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
}


IMAGE, PATCHES = 98, 16  # the token that stands for one patch of an image, and how many there are
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}

VLMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "llava": lambda sizes: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=hf.LlamaConfig(**sizes),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
    ),
    "llava_qwen3": lambda sizes: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.SiglipVisionConfig(**VISION),
            text_config=hf.Qwen3Config(**sizes, head_dim=16),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    ),
    "internvl": lambda sizes: hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(**dict(VISION, image_size=[64, 64], patch_size=[8, 8])),
            text_config=hf.Qwen2Config(**sizes),
            image_token_id=IMAGE,
        )
    ),
    "llava_mistral": lambda sizes: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=hf.MistralConfig(**sizes, sliding_window=None),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
    ),
}


def build(name: str, dtype: torch.dtype = torch.float64, layers: int = 5) -> Any:
    """The same weights every time."""
    torch.manual_seed(7)
    model: Any = (DECODERS | VLMS)[name](SIZES | {"num_hidden_layers": layers}).to(dtype).eval()
    with torch.no_grad():  # as they are initialised, random models predict one token for ever
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None  # never stop early
    return model


def prompts(batch: int = 3, *, model: str = "") -> dict[str, Tensor]:
    """Samples with 0, 3, 6, ... tokens of padding in front; for a VLM with an image behind the first word."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 98, (batch, LENGTH), generator=generator)
    padding = 3 * (torch.arange(batch) % 3).unsqueeze(1)
    mask = (torch.arange(LENGTH) >= padding).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids * mask, "attention_mask": mask, "position_ids": positions}
    if model in VLMS:
        side = 64 if model == "internvl" else 32
        inputs["input_ids"] = inputs["input_ids"].scatter(1, padding + 1 + torch.arange(PATCHES), IMAGE)
        pixels = torch.randn(batch, 3, side, side, generator=generator, dtype=torch.float64)
        inputs["pixel_values"] = pixels
    return inputs
