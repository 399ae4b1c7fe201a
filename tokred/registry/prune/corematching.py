"""CoreMatching: image tokens that fire few of the neurons that the prompt's words fire are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from tokred.errors import ArgumentError
from tokred.registry.method import check_int, keep_fraction
from tokred.registry.register import register
from tokred.registry.site import Place, Site, precise
from tokred.registry.visual import VisualCut


@register("prune", "corematching")
@dataclass(frozen=True)
class CoreMatching(VisualCut):
    """Keep the visual tokens that fire the most of the core neurons in the MLP of the layer before.

    Wang et al.: "CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for Comprehensive
    Acceleration of Vision-Language Models", ICML 2025, arXiv 2505.19235: its token side. A neuron fires for a token
    where it is positive; the core neurons of a prompt are those that fire for most of its tokens, padding apart.

    Every positive neuron of a token counts, as in the released code; the paper takes each token's largest first. The
    released code drops nothing; it sets keys and values to zero.

    The paper keeps what lies before the elbow of the sorted counts, another number for each prompt. A compiled graph
    has one shape, and that number is not known without waiting for the device: so `keep` says how many, for all
    prompts. To have the paper's choice within it, find the elbow of a few prompts beforehand:

        counts = elbow(core_matches(neurons, valid, core)[:, visual])   # neurons: what down_proj of layer - 1 reads
        CoreMatching(layer=layer, core=core, keep=share_with_room(counts, visual_tokens))

    (`tokred.registry.elbow`). All tokens of the paper's are kept then, and the next best up to the share.

    layer         the first layer that runs on fewer tokens; 6, as the released code looks at layer 5 first
    keep, ratio   fraction of the visual tokens kept or removed, rounded; 0.25
    core          fraction of the neurons that are core neurons; 0.4
    """

    layer: int = 6
    keep: float | None = None
    ratio: float | None = None
    core: float = 0.4

    needs = ("visual", "neurons")

    def __post_init__(self) -> None:
        check_int(self.name, "layer", self.layer, 1)
        keep_fraction(self.name, self.keep, self.ratio, 0.25)
        if not isinstance(self.core, (int, float)) or isinstance(self.core, bool) or not 0 < self.core <= 1:
            raise ArgumentError(f"{self.name}(core={self.core!r}): a fraction in (0, 1]")

    def default_layers(self, depth: int) -> list[int]:
        return [min(self.layer, depth - 1)]

    def left(self, place: Place) -> Any:
        return round(keep_fraction(self.name, self.keep, self.ratio, 0.25) * place.free)

    def score(self, site: Site) -> Tensor:
        assert site.neurons is not None
        return _untied(core_matches(site.neurons, site.members(), self.core))


def core_matches(neurons: Tensor, members: Tensor, core: float) -> Tensor:
    """[B N] how many of its sample's core neurons each token fires.

    neurons  [B N F] what the last linear of an MLP reads
    members  [B N] 1 or True, 0 for padding
    core     fraction of the neurons that are core neurons: those that are positive for most tokens
    """
    fires = (neurons > 0).to(precise(neurons).dtype)
    often = (members.to(fires.dtype).unsqueeze(1) @ fires).squeeze(1)  # [B F]
    chosen = _untied(often).topk(ceil(core * often.shape[-1]), dim=-1).indices
    member = often.new_zeros(often.shape).scatter(1, chosen, 1.0)
    return (fires @ member.unsqueeze(-1)).squeeze(-1)


def _untied(counts: Tensor) -> Tensor:
    """[B X] counts, of which the first of several equal ones is the largest."""
    return counts - torch.arange(counts.shape[-1], device=counts.device) / counts.shape[-1]
