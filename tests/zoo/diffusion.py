"""diffusers: transformers and U-Nets that denoise latents."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.zoo.architecture import Architecture, Inputs


class _Sample(nn.Module):
    """The denoised sample as a plain tensor: diffusers' output classes are no pytrees."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        sample: Tensor = self.model(**inputs, return_dict=False)[0]
        return sample


def _dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def _dit_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 4, 16, 16),
        "timestep": torch.full((batch,), 7),
        "class_labels": torch.arange(batch) % 10,
    }


def _pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        cross_attention_dim=64,
        caption_channels=32,
        use_additional_conditions=False,
    )


def _pixart_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 4, 16, 16),
        "timestep": torch.full((batch,), 7),
        "encoder_hidden_states": torch.randn(batch, 24, 32),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sd_unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _sd_unet_inputs(batch: int) -> Inputs:
    return {
        "sample": torch.randn(batch, 4, 16, 16),
        "timestep": torch.full((batch,), 7),
        "encoder_hidden_states": torch.randn(batch, 24, 32),
    }


def _sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )


def _sd3_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 4, 16, 16),
        "timestep": torch.full((batch,), 7),
        "encoder_hidden_states": torch.randn(batch, 24, 32),
        "pooled_projections": torch.randn(batch, 32),
    }


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )


def _flux_inputs(batch: int) -> Inputs:
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    return {
        "hidden_states": torch.randn(batch, 36, 16),
        "encoder_hidden_states": torch.randn(batch, 24, 32),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.stack([torch.zeros(36), rows.flatten(), columns.flatten()], dim=-1),
        "txt_ids": torch.zeros(24, 3),
    }


def _diffusion(
    name: str, build: Any, inputs: Any, attention: int, mlp: int, lengths: tuple[int, ...], why: str
) -> Architecture:
    tags = frozenset({"diffusion", "grid", "dense"})
    return Architecture(name, lambda: _Sample(build()), inputs, attention, mlp, lengths, tags, why)


ARCHITECTURES = (
    _diffusion("dit", _dit, _dit_inputs, 3, 3, (64,), "adaLN gates every block; unpatchified at the end"),
    _diffusion("pixart", _pixart, _pixart_inputs, 4, 2, (64,), "self and cross attention in each block"),
    _diffusion(
        "sd_unet", _sd_unet, _sd_unet_inputs, 8, 4, (256, 64), "U-Net: tokens exist only inside the blocks; GEGLU"
    ),
    _diffusion("sd3", _sd3, _sd3_inputs, 2, 3, (88,), "image and text tokens join in one attention, apart elsewhere"),
    _diffusion(
        "flux", _flux, _flux_inputs, 4, 6, (60,), "joint blocks, then parallel attention and MLP; rotary in three axes"
    ),
)
