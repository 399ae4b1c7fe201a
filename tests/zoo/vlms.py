"""Vision-language models: pixels and a prompt in, the next tokens' logits and a KV cache out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf

from tests.zoo.architecture import Architecture, Inputs
from tests.zoo.decoders import WORDS
from tests.zoo.text import SIZES

__all__ = ["ARCHITECTURES", "IMAGE"]

LENGTH, IMAGE = 30, 98  # tokens of a prompt; the token that stands for one row of an image's features
TEXT: dict[str, Any] = {key: value for key, value in WORDS.items() if key != "use_cache"} | {"num_hidden_layers": 2}
VISION: dict[str, Any] = SIZES | {"num_hidden_layers": 1, "image_size": 32, "patch_size": 8}  # 16 patches
GEMMA: dict[str, Any] = TEXT | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}
ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
SPECIAL: dict[str, int] = {
    "image_token_id": IMAGE,
    "video_token_id": 95,
    "vision_start_token_id": 96,
    "vision_end_token_id": 97,
}


def _prompt(batch: int, patches: int, first: int = 2, length: int = LENGTH) -> Inputs:
    """Token ids [B N] with the image behind the first words, none of them padding."""
    ids = torch.randint(5, 94, (batch, length))
    ids[:, first : first + patches] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _one_image(patches: int, size: int = 32, images: int = 0, first: int = 2) -> Callable[[int], Inputs]:
    """A prompt with an image [B 3 size size], or with `images` more dimensions in front of the channels."""

    def inputs(batch: int) -> Inputs:
        shape = (batch, images, 3, size, size) if images else (batch, 3, size, size)
        return _prompt(batch, patches, first) | {"pixel_values": torch.randn(shape)}

    return inputs


def _llava_next() -> Any:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[32, 32]],
    )
    return hf.LlavaNextForConditionalGeneration(config)


def _llava_next_inputs(batch: int) -> Inputs:
    """The image as a whole, 16 patches, and as the only tile of a grid, 4 rows of 4 patches and a newline."""
    tiles = {"pixel_values": torch.randn(batch, 2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * batch)}
    return _prompt(batch, 16 + 4 * (4 + 1), length=LENGTH + 20) | tiles


def _internvl() -> Any:
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**dict(VISION, image_size=[64, 64], patch_size=[8, 8])),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
    )
    return hf.InternVLForConditionalGeneration(config)


def _paligemma() -> Any:
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=64),
        text_config=hf.GemmaConfig(**TEXT, head_dim=16),
        image_token_index=IMAGE,
        projection_dim=64,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def _paligemma_inputs(batch: int) -> Inputs:
    prompt = _prompt(batch, 16, 0)
    return prompt | {
        "pixel_values": torch.randn(batch, 3, 32, 32),
        "token_type_ids": torch.zeros_like(prompt["input_ids"]),
    }


def _gemma3() -> Any:
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.Gemma3TextConfig(**GEMMA),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=96,
        eoi_token_index=97,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _gemma3_inputs(batch: int) -> Inputs:
    prompt = _prompt(batch, 4)
    return prompt | {
        "pixel_values": torch.randn(batch, 3, 32, 32),
        "token_type_ids": (prompt["input_ids"] == IMAGE).long(),
    }


def _idefics(name: str) -> Any:
    """Idefics3, and SmolVLM, which is the same under its own name."""
    vision, text = getattr(hf, f"{name}VisionConfig")(**VISION), hf.LlamaConfig(**TEXT)
    config = getattr(hf, f"{name}Config")(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2)
    return getattr(hf, f"{name}ForConditionalGeneration")(config)


def _blip2() -> Any:
    sizes = {"vocab_size": 99, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.Blip2Config(
        vision_config=hf.Blip2VisionConfig(**VISION),
        qformer_config=hf.Blip2QFormerConfig(**SIZES | {"num_hidden_layers": 1}, vocab_size=99),
        text_config=hf.OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=64, pad_token_id=0),
        num_query_tokens=8,
        image_token_index=IMAGE,
    )
    return hf.Blip2ForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    config = hf.Qwen2VLConfig(text_config=TEXT | ROPE, vision_config=vision, **SPECIAL)
    return hf.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> Any:
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "out_hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 128,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [],
    }
    config = hf.Qwen2_5_VLConfig(text_config=TEXT | ROPE, vision_config=vision, **SPECIAL)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen_inputs(batch: int) -> Inputs:
    prompt = _prompt(batch, 16)
    return prompt | {
        "pixel_values": torch.randn(batch * 64, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * batch),
        "mm_token_type_ids": (prompt["input_ids"] == IMAGE).int(),
    }


def _vlm(name: str, build: Any, inputs: Any, tokens: tuple[int, ...], **fields: Any) -> Architecture:
    known = {"attention": 3, "mlp": 3} | fields
    tags = frozenset({"vision", "causal", "vlm"})
    return Architecture(name, build, inputs, self_attention_tokens=(*tokens, LENGTH), tags=tags, **known)


ARCHITECTURES = (
    _vlm(
        "llava_next",
        _llava_next,
        _llava_next_inputs,
        (17, LENGTH + 20),
        why="a whole image and its tiles; Python on their sizes breaks the graph, but not behind the masked_scatter",
    ),
    _vlm("internvl", _internvl, _one_image(16, 64), (65,), why="pixel shuffle: four patches are one token"),
    _vlm("paligemma", _paligemma, _paligemma_inputs, (16,), why="image and question see each other: no causal mask"),
    _vlm(
        "gemma3_vlm",
        _gemma3,
        _gemma3_inputs,
        (16,),
        why="patches pooled to tokens; tokens of one image see each other, through a mask that a vmap makes",
    ),
    _vlm(
        "idefics3",
        partial(_idefics, "Idefics3"),
        _one_image(4, images=1),
        (16,),
        why="empty images are left out of the batch: how many image tokens there are is data",
    ),
    _vlm(
        "smolvlm",
        partial(_idefics, "SmolVLM"),
        _one_image(4, images=1),
        (16,),
        visual=(2, 6),
        why="as idefics3, and options say where the image is",
    ),
    _vlm(
        "blip2",
        _blip2,
        _one_image(8, first=0),
        (17, 8),
        attention=5,
        mlp=4,
        why="learned queries read the image by cross-attention; the language model is OPT",
    ),
    _vlm(
        "qwen2_vl",
        _qwen2_vl,
        _qwen_inputs,
        (64,),
        attention=4,
        why="image sizes are data and steer Python: many graphs, and the masked_scatter is in another than the decoder",
    ),
    _vlm(
        "qwen2_5_vl",
        _qwen2_5_vl,
        _qwen_inputs,
        (16,),
        attention=10,
        visual=(2, 18),
        why="as qwen2_vl, windows in the vision encoder, and options say where the image is",
    ),
)
