"""Grids, windows and dense prediction: models that need every token back in its place."""

from __future__ import annotations

from typing import Any

import transformers as hf
from torch import nn

from tests.zoo.architecture import Architecture, images
from tests.zoo.vision import SIZES, TOWER


def _dense(
    name: str, build: Any, attention: int, mlp: int, lengths: tuple[int, ...], *tags: str, **fields: Any
) -> Architecture:
    known = {"inputs": images(56)} | fields
    return Architecture(
        name,
        build,
        attention=attention,
        mlp=mlp,
        self_attention_tokens=lengths,
        tags=frozenset({"vision", "dense", "grid", *tags}),
        **known,
    )


def _dpt() -> nn.Module:
    config = hf.DPTConfig(
        **dict(TOWER, num_hidden_layers=4),
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
        is_hybrid=False,
        reassemble_factors=[4, 2, 1, 0.5],
    )
    return hf.DPTForDepthEstimation(config)


def _depth_anything() -> nn.Module:
    backbone = hf.Dinov2Config(
        **dict(TOWER, num_hidden_layers=4),
        mlp_ratio=2,
        out_indices=[1, 2, 3, 4],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    config = hf.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=8,
        reassemble_hidden_size=64,
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )
    return hf.DepthAnythingForDepthEstimation(config)


def _segformer() -> nn.Module:
    config = hf.SegformerConfig(
        num_encoder_blocks=3,
        depths=[1, 2, 1],
        sr_ratios=[4, 2, 1],
        hidden_sizes=[32, 32, 64],
        patch_sizes=[7, 3, 3],
        strides=[4, 2, 2],
        num_attention_heads=[1, 2, 4],
        mlp_ratios=[2, 2, 2],
        decoder_hidden_size=32,
        num_labels=5,
    )
    return hf.SegformerForSemanticSegmentation(config)


def _swin(version: int) -> nn.Module:
    sizes: dict[str, Any] = {
        "image_size": 56,
        "patch_size": 4,
        "embed_dim": 32,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "mlp_ratio": 2.0,
    }
    if version == 1:
        return hf.SwinForImageClassification(hf.SwinConfig(**sizes, window_size=7))
    return hf.Swinv2ForImageClassification(hf.Swinv2Config(**sizes, window_size=7))


def _sam() -> nn.Module:
    config = hf.SamVisionConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        mlp_dim=128,
        output_channels=32,
        image_size=64,
        patch_size=8,
        window_size=4,
        global_attn_indexes=[2],
        num_pos_feats=16,
    )
    return hf.SamVisionModel(config)


def _beit_segmentation() -> nn.Module:
    config = hf.BeitConfig(
        **dict(SIZES, num_hidden_layers=4),
        image_size=64,
        patch_size=8,
        use_relative_position_bias=True,
        out_indices=[1, 2, 3, 4],
        use_auxiliary_head=False,
        num_labels=5,
        reshape_hidden_states=True,
    )
    return hf.BeitForSemanticSegmentation(config)


ARCHITECTURES = (
    _dense("dpt", _dpt, 4, 4, (50,), "cls", why="four taps back to the grid, for convolutions"),
    _dense("depth_anything", _depth_anything, 4, 4, (50,), "cls", why="DINOv2 below, DPT neck above"),
    _dense(
        "beit_segmentation",
        _beit_segmentation,
        4,
        4,
        (65,),
        "cls",
        inputs=images(64),
        why="position bias and a feature pyramid",
    ),
    _dense(
        "segformer",
        _segformer,
        4,
        4,
        (256, 64, 16),
        inputs=images(64),
        why="keys shrunk by a convolution; depthwise convolution in the MLP",
    ),
    _dense("swin", lambda: _swin(1), 4, 4, (49, 196), "windows", why="shifted windows of 7 x 7"),
    _dense("swinv2", lambda: _swin(2), 4, 4, (49, 196), "windows", why="cosine attention with a learned scale"),
    _dense(
        "sam_vision",
        _sam,
        3,
        3,
        (16, 64),
        "windows",
        inputs=images(64),
        why="tokens stay a [B H W C] grid; decomposed position bias",
    ),
    _dense(
        "vitdet",
        lambda: hf.VitDetModel(
            hf.VitDetConfig(
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                mlp_ratio=2,
                image_size=64,
                pretrain_image_size=64,
                patch_size=8,
                window_size=4,
                window_block_indices=[0, 1],
                use_relative_position_embeddings=True,
            )
        ),
        3,
        3,
        (16, 64),
        "windows",
        inputs=images(64),
        why="NCHW between blocks, windows inside",
    ),
    _dense(
        "pvt",
        lambda: hf.PvtForImageClassification(
            hf.PvtConfig(
                image_size=64,
                num_encoder_blocks=2,
                depths=[2, 2],
                sequence_reduction_ratios=[4, 1],
                hidden_sizes=[32, 64],
                patch_sizes=[4, 2],
                strides=[4, 2],
                num_attention_heads=[1, 2],
                mlp_ratios=[2, 2],
            )
        ),
        4,
        4,
        (256, 65),
        inputs=images(64),
        why="keys shrunk by a convolution",
    ),
    _dense(
        "hiera",
        lambda: hf.HieraForImageClassification(
            hf.HieraConfig(
                embed_dim=32,
                image_size=[64, 64],
                patch_size=[7, 7],
                patch_stride=[4, 4],
                patch_padding=[3, 3],
                mlp_ratio=2.0,
                depths=[1, 2],
                num_heads=[1, 2],
                embed_dim_multiplier=2.0,
                num_query_pool=1,
                query_stride=[2, 2],
                masked_unit_size=[4, 4],
                masked_unit_attention=[True, False],
            )
        ),
        3,
        3,
        (256, 64, 16),
        inputs=images(64),
        why="mask-unit attention, queries pooled between stages",
    ),
)
