"""The models that the oracles cover, small enough for float64: how to build one, what to feed it, which oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import transformers as tr
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .bert import bert_classifier, bert_model
from .clip import clip_vision, siglip_vision
from .dinov2 import dinov2_classifier, dinov2_model
from .driver import Method
from .timm_vit import timm_vit
from .vit import deit_with_teacher, vit_classifier, vit_model

Oracle = Callable[[nn.Module, Tensor, Method | None], dict[str, Tensor]]

IMAGE = {"image_size": 32, "patch_size": 4}  # 64 patches
SHAPE = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
WIDE = SHAPE | {"intermediate_size": 96}


@dataclass(frozen=True)
class Case:
    """One model and its oracle."""

    name: str
    make: Callable[[], nn.Module]
    oracle: Oracle
    head: int  # protected tokens
    text: bool = False
    grid: tuple[int, int] | None = (8, 8)
    image: int = 32

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.make().double().eval()
        randomise(model, seed)
        return model

    def inputs(self, batch: int = 3, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.text:
            return torch.randint(5, 90, (batch, 33), generator=generator)
        return torch.randn(batch, 3, self.image, self.image, generator=generator, dtype=torch.float64)


def randomise(model: nn.Module, seed: int) -> None:
    """Replace the initial weights: at std 0.02 all attention is nearly uniform, and a wrong bias would hardly show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel() if parameter.shape[0] > 1 else 1
                parameter.copy_(noise * fan_in**-0.5)
            else:
                parameter.add_(0.2 * noise)


def outputs(model: nn.Module, x: Tensor, keys: list[str]) -> dict[str, Tensor]:
    """The model's outputs by the oracle's names; a bare tensor is the logits."""
    result: Any = model(x)
    return {"logits": result} if isinstance(result, Tensor) else {key: result[key] for key in keys}


def dino(kind: str, registers: int = 0, classifier: bool = False) -> nn.Module:
    extra: dict[str, Any] = {"num_register_tokens": registers} if registers else {}
    config = getattr(tr, f"{kind}Config")(**SHAPE, **IMAGE, mlp_ratio=2, layerscale_value=0.5, **extra)
    return getattr(tr, f"{kind}ForImageClassification" if classifier else f"{kind}Model")(config)


def timm_tiny(cls: type[nn.Module] = VisionTransformer, **options: Any) -> nn.Module:
    return cls(img_size=32, patch_size=4, embed_dim=48, depth=4, num_heads=4, mlp_ratio=2, num_classes=10, **options)


def bert(cls: Any) -> nn.Module:
    return cls(tr.BertConfig(vocab_size=97, max_position_embeddings=64, **WIDE))


CASES = [
    Case("vit_classifier", lambda: tr.ViTForImageClassification(tr.ViTConfig(**WIDE, **IMAGE)), vit_classifier, 1),
    Case("vit_model", lambda: tr.ViTModel(tr.ViTConfig(**WIDE, **IMAGE)), vit_model, 1),
    Case(
        "deit_with_teacher",
        lambda: tr.DeiTForImageClassificationWithTeacher(tr.DeiTConfig(**WIDE, **IMAGE)),
        deit_with_teacher,
        2,
    ),
    Case("clip_vision", lambda: tr.CLIPVisionModel(tr.CLIPVisionConfig(**WIDE, **IMAGE)), clip_vision, 1),
    Case("siglip_vision", lambda: tr.SiglipVisionModel(tr.SiglipVisionConfig(**WIDE, **IMAGE)), siglip_vision, 0),
    Case("dinov2_model", lambda: dino("Dinov2"), dinov2_model, 1),
    Case("dinov2_classifier", lambda: dino("Dinov2", classifier=True), dinov2_classifier, 1),
    Case("dinov2_registers_model", lambda: dino("Dinov2WithRegisters", 4), dinov2_model, 5),
    Case("dinov2_registers_classifier", lambda: dino("Dinov2WithRegisters", 4, True), dinov2_classifier, 5),
    Case("bert_model", lambda: bert(tr.BertModel), bert_model, 1, text=True, grid=None),
    Case("bert_classifier", lambda: bert(tr.BertForSequenceClassification), bert_classifier, 1, text=True, grid=None),
    Case("timm_vit", timm_tiny, timm_vit, 1),
    Case("timm_vit_avg", partial(timm_tiny, global_pool="avg"), timm_vit, 1),
    Case("timm_deit_distilled", partial(timm_tiny, VisionTransformerDistilled), timm_vit, 2),
]

# The real size, once: twelve blocks, 197 tokens.
DEIT_SMALL = Case(
    "timm_deit_small", lambda: timm.create_model("deit_small_patch16_224"), timm_vit, 1, grid=(14, 14), image=224
)

BY_NAME = {case.name: case for case in [*CASES, DEIT_SMALL]}
