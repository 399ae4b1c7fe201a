"""TTF-VLA: image tokens of the frame before are used again where the picture did not change and nothing looks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from tokred.errors import ArgumentError
from tokred.registry.frames import FrameFusion, Frames
from tokred.registry.method import check_int
from tokred.registry.register import register
from tokred.registry.site import precise


@register("merge", "temporal_fusion")
@dataclass(frozen=True)
class TemporalFusion(FrameFusion):
    """Of each image take only those tokens anew whose pixels changed or that the text looked at one call before.

    "TTF-VLA: Temporal Token Fusion via Pixel-Attention Integration for Vision-Language-Action Models", arXiv
    2508.19257, in its hybrid form: a patch is taken anew if the mean change of its grey values is above `pixel`, or if
    it is among those that the words behind the image gave most attention in the call before (mean over heads and
    words). What is used again may have been used again before. In every `keyframe`-th call all are taken anew, and in
    the first, which is also what a call with another number of images is; `restart()` of the object that was compiled
    makes the next one the first, as a control loop does for each episode.

    It saves no compute, here as in the released code: the vision encoder runs in full, and the language model reads as
    many tokens. It steadies what the model reads. The paper fuses in front of the projector, which works row by row;
    this, behind it. The paper's model has two encoders side by side; here one must show. Without its "semantic" form.

    keyframe   every how many calls all tokens are new; 5, the released code's
    pixel      change of grey values, of pixels as the encoder reads them, above which a patch is new; 0.1, the released
               code's, 0.03 in its instructions; None looks at no pixels
    relevant   fraction of an image's tokens that are new because the text looked at them, rounded; 120 of 256, the
               released code's, 70 in its instructions; 0 looks at no attention
    layer      the layer whose attention that is; None is 15 of 32, in proportion. `layers` is not used
    """

    keyframe: int = 5
    pixel: float | None = 0.1
    relevant: float = 120 / 256
    layer: int | None = None

    def __post_init__(self) -> None:
        check_int(self.name, "keyframe", self.keyframe, 1)
        if self.layer is not None:
            check_int(self.name, "layer", self.layer, 0)
        if self.layers is not None:
            raise ArgumentError(f"{self.name}(layers={self.layers!r}): say `layer`, whose attention it looks at")
        if self.pixel is not None and not (type(self.pixel) in (int, float) and self.pixel >= 0):
            raise ArgumentError(f"{self.name}(pixel={self.pixel!r}): a number >= 0, or None")
        if type(self.relevant) not in (int, float) or not 0 <= self.relevant <= 1:
            raise ArgumentError(f"{self.name}(relevant={self.relevant!r}): a fraction in [0, 1]")

    def looks(self, depth: int) -> int | None:
        if self.relevant == 0:
            return None
        return min(round(15 / 32 * depth) if self.layer is None else self.layer, depth - 1)

    def fuse(self, pixels: Tensor, features: Tensor, before: Frames, step: Tensor) -> Tensor:
        new = (step % self.keyframe == 0).expand(features.shape[:2])  # [I P]
        if self.pixel is not None:
            change = (_grey(pixels) - _grey(before.pixels)).abs()  # [I 1 H W]
            new = new | (avg_pool2d(change, before.patch).flatten(1) > self.pixel)
        if before.relevance is not None:
            looked = before.relevance.topk(round(self.relevant * features.shape[1]), dim=1).indices
            new = new | torch.zeros_like(new).scatter(1, looked, True)
        return torch.where(new.unsqueeze(-1), features, before.features)


def _grey(pixels: Tensor) -> Tensor:
    """[I 3 H W] -> [I 1 H W]: the weights of ITU-R BT.601, as OpenCV's."""
    red, green, blue = precise(pixels).split(1, dim=1)
    grey: Tensor = 0.299 * red + 0.587 * green + 0.114 * blue
    return grey
