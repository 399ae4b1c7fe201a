"""The models that are measured: real classes from timm and transformers, random weights (speed does not read them)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.handwritten import HandWritten, load_weights
from tests.zoo.torchvision_shim import install

__all__ = ["MODELS", "Shape", "build", "pixels", "rebuild"]

Hand = TypeVar("Hand", bound=HandWritten)


@dataclass(frozen=True)
class Shape:
    """A ViT with patches of 16 x 16 pixels and 1000 classes."""

    width: int
    heads: int
    library: str  # which library's ViT
    depth: int = 12
    image: int = 224
    patch: int = 16
    classes: int = 1000


MODELS = {
    "deit_small": Shape(384, 6, "timm"),
    "vit_small": Shape(384, 6, "transformers"),
    "vit_base": Shape(768, 12, "timm"),
    "tiny": Shape(64, 4, "timm", depth=4, image=64, patch=8, classes=10),  # for tests of the benchmark itself
    "tiny_transformers": Shape(64, 4, "transformers", depth=4, image=64, patch=8, classes=10),
}


class Logits(nn.Module):
    """transformers returns a dataclass; a benchmark compares tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def build(name: str, seed: int = 0) -> nn.Module:
    """The unmodified model, in eval mode, with weights that give uneven attention."""
    shape = MODELS[name]
    torch.manual_seed(seed)
    model = _timm(shape) if shape.library == "timm" else Logits(_transformers(shape))
    with torch.no_grad():
        for parameter in model.parameters():  # position and class tokens start as zeros in some of these classes
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def _timm(shape: Shape) -> nn.Module:
    install()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=shape.image,
        patch_size=shape.patch,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=shape.classes,
    )


def _transformers(shape: Shape) -> nn.Module:
    install()
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=shape.width,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.width,
            image_size=shape.image,
            patch_size=shape.patch,
            num_labels=shape.classes,
            layer_norm_eps=1e-6,
        )
    )


def rebuild(name: str, model: nn.Module, make: Callable[..., Hand], **options: object) -> Hand:
    """The hand-written counterpart of `build(name)`, with the same weights."""
    shape = MODELS[name]
    size = {"image": shape.image, "patch": shape.patch, "classes": shape.classes}
    hand = make(shape.width, shape.depth, shape.heads, **size, **options)
    hand.to(next(model.parameters()).dtype)
    load_weights(hand, model.model if isinstance(model, Logits) else model)  # type: ignore[arg-type]
    return hand.eval()


def pixels(name: str, batch: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    side = MODELS[name].image
    return torch.randn(batch, 3, side, side, generator=generator).to(dtype)
