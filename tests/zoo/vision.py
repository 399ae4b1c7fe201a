"""Vision transformers of Hugging Face transformers that classify or embed."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from tests.zoo.architecture import Architecture, Inputs, images

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
GRID: dict[str, Any] = {"image_size": 56, "patch_size": 8}  # 7 x 7 patches
TOWER = SIZES | GRID
PIXELS = images(56)


def _vision(name: str, build: Any, tokens: int, *tags: str, **fields: Any) -> Architecture:
    known = {"inputs": PIXELS, "attention": 3, "mlp": 3, "self_attention_tokens": (tokens,)} | fields
    return Architecture(name, build, tags=frozenset({"vision", *tags}), **known)


def _vit_interpolated(batch: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 64, 64), "interpolate_pos_encoding": True}


def _clip() -> nn.Module:
    text = dict(SIZES, vocab_size=99, max_position_embeddings=32, bos_token_id=1, eos_token_id=98)
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=dict(TOWER), projection_dim=32))


def _clip_inputs(batch: int) -> Inputs:
    ids = torch.randint(5, 96, (batch, 24))
    ids[:, -1] = 98  # end of text
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **PIXELS(batch)}


def _siglip() -> nn.Module:
    text = dict(SIZES, vocab_size=99, max_position_embeddings=24, projection_size=64, bos_token_id=1, eos_token_id=2)
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=dict(TOWER)))


def _siglip_inputs(batch: int) -> Inputs:
    return {"input_ids": torch.randint(5, 96, (batch, 24)), **PIXELS(batch)}


def _siglip2_inputs(batch: int) -> Inputs:
    return {
        "pixel_values": torch.randn(batch, 49, 3 * 8 * 8),
        "pixel_attention_mask": torch.ones(batch, 49, dtype=torch.long),
        "spatial_shapes": torch.tensor([[7, 7]] * batch),
    }


def _vitmae_inputs(batch: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 64, 64), "noise": torch.rand(batch, 64)}


def _vitmae(for_pretraining: bool) -> nn.Module:
    config = hf.ViTMAEConfig(
        **SIZES,
        image_size=64,
        patch_size=8,
        mask_ratio=0.5,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
    )
    return hf.ViTMAEForPreTraining(config) if for_pretraining else hf.ViTMAEModel(config)


ARCHITECTURES = (
    _vision("vit", lambda: hf.ViTForImageClassification(hf.ViTConfig(**TOWER)), 50, "cls", why="the plain case"),
    _vision(
        "vit_eager",
        lambda: hf.ViTModel(hf.ViTConfig(**TOWER, attn_implementation="eager")),
        50,
        "cls",
        why="softmax(q k^T) v written out; the whole hidden state is an output",
    ),
    _vision(
        "vit_interpolated",
        lambda: hf.ViTModel(hf.ViTConfig(**TOWER)),
        65,
        "cls",
        inputs=_vit_interpolated,
        why="position embeddings resized in the graph",
    ),
    _vision(
        "deit_distilled",
        lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**TOWER)),
        51,
        "cls",
        why="two protected tokens, read by select(0) and select(1)",
    ),
    _vision(
        "beit",
        lambda: hf.BeitForImageClassification(hf.BeitConfig(**TOWER, use_relative_position_bias=True)),
        50,
        "cls",
        why="a relative position bias [H N N] made in every layer; mean pooling without the class token",
    ),
    _vision(
        "data2vec_vision",
        lambda: hf.Data2VecVisionForImageClassification(
            hf.Data2VecVisionConfig(**TOWER, use_shared_relative_position_bias=True)
        ),
        50,
        "cls",
        why="one position bias shared by all layers",
    ),
    _vision(
        "clip",
        _clip,
        50,
        "cls",
        "text",
        inputs=_clip_inputs,
        attention=6,
        mlp=6,
        self_attention_tokens=(50, 24),
        why="two encoders in one graph, the text one causal and read at the end-of-text token",
    ),
    _vision(
        "clip_vision",
        lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**TOWER, projection_dim=32)),
        50,
        "cls",
        why="quick GELU",
    ),
    _vision(
        "siglip",
        _siglip,
        49,
        "text",
        inputs=_siglip_inputs,
        attention=7,
        mlp=7,
        self_attention_tokens=(49, 24),
        why="no class token; a learned query pools the patches",
    ),
    _vision(
        "siglip_vision",
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**TOWER)),
        49,
        attention=4,
        mlp=4,
        why="the pooling head is F.multi_head_attention_forward",
    ),
    _vision(
        "siglip2_vision",
        lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**SIZES, num_patches=49, patch_size=8)),
        49,
        "breaks",
        inputs=_siglip2_inputs,
        attention=4,
        mlp=4,
        why="patches and their padding mask are inputs; reading the shapes breaks the graph",
    ),
    _vision(
        "dinov2",
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**TOWER, mlp_ratio=2)),
        50,
        "cls",
        why="LayerScale",
    ),
    _vision(
        "dinov2_registers",
        lambda: hf.Dinov2WithRegistersForImageClassification(
            hf.Dinov2WithRegistersConfig(**TOWER, mlp_ratio=2, num_register_tokens=4)
        ),
        54,
        "cls",
        why="four register tokens; the head reads the class token and the patches' mean",
    ),
    _vision(
        "dinov2_swiglu",
        lambda: hf.Dinov2Model(hf.Dinov2Config(**TOWER, mlp_ratio=2, use_swiglu_ffn=True)),
        50,
        "cls",
        why="gated MLP with packed weights",
    ),
    _vision(
        "dinov3",
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**TOWER, num_register_tokens=4)),
        54,
        "cls",
        why="rotary tables for the patches only",
    ),
    _vision(
        "vitmae",
        lambda: _vitmae(for_pretraining=False),
        33,
        "cls",
        inputs=_vitmae_inputs,
        why="the model itself drops half of the tokens and returns where they went",
    ),
    _vision(
        "vitmae_pretraining",
        lambda: _vitmae(for_pretraining=True),
        33,
        "cls",
        inputs=_vitmae_inputs,
        attention=5,
        mlp=5,
        self_attention_tokens=(33, 65),
        why="encoder on 33 tokens, decoder on all 65",
    ),
    _vision("vit_msn", lambda: hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**TOWER)), 50, "cls"),
    _vision(
        "ijepa", lambda: hf.IJepaForImageClassification(hf.IJepaConfig(**TOWER)), 49, why="no class token, mean pooling"
    ),
    _vision(
        "yolos",
        lambda: hf.YolosForObjectDetection(
            hf.YolosConfig(**SIZES, image_size=[56, 56], patch_size=8, num_detection_tokens=6, num_labels=5)
        ),
        56,
        "cls",
        why="six detection tokens at the end are the output",
    ),
    _vision(
        "videomae",
        lambda: hf.VideoMAEForVideoClassification(
            hf.VideoMAEConfig(**SIZES, image_size=32, patch_size=8, num_frames=4, tubelet_size=2)
        ),
        32,
        inputs=lambda batch: {"pixel_values": torch.randn(batch, 4, 3, 32, 32)},
        why="tokens are space-time tubes",
    ),
    _vision(
        "vivit",
        lambda: hf.VivitForVideoClassification(
            hf.VivitConfig(**SIZES, image_size=32, num_frames=4, tubelet_size=[2, 8, 8])
        ),
        33,
        "cls",
        inputs=lambda batch: {"pixel_values": torch.randn(batch, 4, 3, 32, 32)},
    ),
    _vision("blip2_vision", lambda: hf.Blip2VisionModel(hf.Blip2VisionConfig(**TOWER)), 50, "cls", why="packed qkv"),
    _vision(
        "pixtral_vision",
        lambda: hf.PixtralVisionModel(hf.PixtralVisionConfig(**SIZES, image_size=56, patch_size=8)),
        49,
        inputs=lambda batch: {"pixel_values": torch.randn(batch, 3, 56, 56), "image_sizes": [(56, 56)] * batch},
        self_attention_tokens=(49, 98, 147),
        why="all images of a batch are one sequence, apart through a block-diagonal mask",
    ),
)
