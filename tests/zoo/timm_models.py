"""timm's vision transformers, by their registered names, with small sizes."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import nn

from tests.zoo.architecture import Architecture, Inputs, images

SIZES: dict[str, Any] = {
    "depth": 3,
    "embed_dim": 64,
    "num_heads": 4,
    "img_size": 56,
    "patch_size": 8,
    "num_classes": 10,
}


def _timm(
    name: str, variant: str, tokens: int | tuple[int, ...], *tags: str, sizes: dict[str, Any] = SIZES, **fields: Any
) -> Architecture:
    """`fields` holds Architecture's own fields; what is left after those goes to timm.create_model."""
    own = {"inputs": images(56, name="x"), "attention": 3, "mlp": 3, "why": ""}
    known = {key: fields.pop(key, default) for key, default in own.items()}
    options = dict(sizes, mlp_ratio=2.0) | fields
    return Architecture(
        f"timm_{name}",
        lambda: timm.create_model(variant, pretrained=False, **options),
        tags=frozenset({"vision", *tags}),
        self_attention_tokens=tokens if isinstance(tokens, tuple) else (tokens,),
        **known,
    )


def _mvit() -> nn.Module:
    config = MultiScaleVitCfg(depths=(1, 2), embed_dim=(32, 64), num_heads=(1, 2), mlp_ratio=2.0)
    return MultiScaleVit(config, img_size=56, num_classes=10)


class _NaFlex(nn.Module):
    """NaFlexViT given its patches, their coordinates and their padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model(
            "naflexvit_base_patch16_gap", pretrained=False, **dict(SIZES, img_size=64), mlp_ratio=2.0
        )

    def forward(self, patches: torch.Tensor, patch_coord: torch.Tensor, patch_valid: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(patches, patch_coord=patch_coord, patch_valid=patch_valid)
        return logits


def _naflex_inputs(batch: int) -> Inputs:
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    coordinates = torch.stack([rows.flatten(), columns.flatten()], dim=-1)
    valid = torch.ones(batch, 36, dtype=torch.bool)
    valid[1:, 30:] = False  # the other images have five rows
    return {
        "patches": torch.randn(batch, 36, 8 * 8 * 3),
        "patch_coord": coordinates.expand(batch, 36, 2).contiguous(),
        "patch_valid": valid,
    }


ARCHITECTURES = (
    _timm("vit", "vit_base_patch16_224", 50, "cls", why="packed qkv, unbind"),
    _timm(
        "vit_gap",
        "vit_base_patch16_224",
        49,
        global_pool="avg",
        class_token=False,
        fc_norm=False,
        why="mean over all tokens",
    ),
    _timm("vit_reg4_gap", "vit_medium_patch16_reg4_gap_256", 53, "cls", why="registers, mean over the patches only"),
    _timm("vit_dinov2_reg4", "vit_small_patch14_reg4_dinov2", 54, "cls", why="class token, registers, LayerScale"),
    _timm(
        "vit_siglip",
        "vit_base_patch16_siglip_224",
        49,
        attention=4,
        mlp=4,
        why="attention pooling with a learned query",
    ),
    _timm("vit_qk_norm", "vit_base_patch16_224", 50, "cls", qk_norm=True, why="q and k normalised in each head"),
    _timm(
        "vit_parallel",
        "vit_small_patch16_18x2_224",
        50,
        "cls",
        attention=6,
        mlp=6,
        why="two attentions side by side on one stream, then two MLPs",
    ),
    _timm("vit_relpos", "vit_relpos_small_patch16_224", 49, why="position bias from an MLP or table"),
    _timm("vit_rope", "vit_small_patch16_rope_224", 50, "cls", why="rotary tables for the patches only"),
    _timm("deit_distilled", "deit_tiny_distilled_patch16_224", 51, "cls", why="two heads, averaged"),
    _timm("deit3", "deit3_small_patch16_224", 50, "cls", why="LayerScale; positions without the class token"),
    _timm("eva02", "eva02_tiny_patch14_224", 50, "cls", why="gated MLP, rotary around the class token"),
    _timm("beit", "beit_base_patch16_224", 50, "cls", why="shared relative position bias, LayerScale"),
    _timm(
        "cait",
        "cait_xxs24_224",
        49,
        attention=4,
        mlp=4,
        depth=2,
        why="talking heads (linear maps across heads); the class token enters last",
    ),
    _timm(
        "xcit",
        "xcit_nano_12_p8_224",
        49,
        "cls",
        "grid",
        attention=4,
        mlp=4,
        depth=2,
        mlp_ratio=2.0,
        why="attention over channels, 3 x 3 convolutions between, class attention last",
    ),
    Architecture(
        "timm_mvitv2",
        _mvit,
        images(56, name="x"),
        3,
        3,
        (196, 49),
        frozenset({"vision", "grid", "dense"}),
        "queries, keys and values pooled by convolutions",
    ),
    _timm(
        "swin",
        "swin_tiny_patch4_window7_224",
        (49, 196),
        "grid",
        "dense",
        "windows",
        attention=4,
        mlp=4,
        sizes={"img_size": 56, "num_classes": 10},
        depths=(2, 2),
        embed_dim=32,
        num_heads=(2, 4),
        window_size=7,
        why="[B H W C] between blocks",
    ),
    _timm(
        "pit",
        "pit_xs_224",
        (37, 10),
        "cls",
        "grid",
        sizes={"num_classes": 10},
        img_size=56,
        patch_size=16,
        stride=8,
        base_dims=(16, 16),
        depth=(1, 2),
        heads=(2, 4),
        why="a strided convolution between the stages",
    ),
    _timm(
        "convit",
        "convit_tiny",
        (49, 50),
        "cls",
        "grid",
        sizes=dict(SIZES, depth=3),
        local_up_to_layer=2,
        why="two layers mix softmax(qk^T) with a learned map of positions before v",
    ),
    _timm(
        "crossvit",
        "crossvit_9_240",
        (37, 17),
        "cls",
        attention=5,
        mlp=3,
        sizes={"num_classes": 10},
        img_size=48,
        img_scale=(1.0, 2 / 3),
        patch_size=(8, 8),
        embed_dim=(32, 64),
        depth=((1, 2, 0),),
        num_heads=(2, 4),
        mlp_ratio=(2.0, 2.0, 1.0),
        why="two branches of their own length, joined by their class tokens",
    ),
    Architecture(
        "timm_naflex",
        _NaFlex,
        _naflex_inputs,
        3,
        3,
        (40,),
        frozenset({"vision", "breaks"}),
        "patches, coordinates and padding are inputs; the position embedding breaks the graph",
    ),
    Architecture(
        "timm_resnet",
        lambda: timm.create_model("test_resnet", pretrained=False, num_classes=10),
        images(64, name="x"),
        0,
        0,
        (),
        frozenset({"vision", "none"}),
        "no attention and no MLP: nothing may be found",
    ),
)
