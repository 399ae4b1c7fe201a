"""Mixture of depths: in each of the later layers a trained router picks the image tokens that go through it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokred.errors import ArgumentError
from tokred.registry.imported import imported
from tokred.registry.method import check_fraction
from tokred.registry.register import register
from tokred.registry.site import Place, Site, precise
from tokred.registry.visual import VisualCut

NAMES = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:.*\.)?\w*router\w*\.(weight|bias)")


class Routers:
    """One linear a layer, from C channels to a number. `layers`: their weights [C] and biases []."""

    def __init__(self, shown: str, layers: dict[int, tuple[Tensor, Tensor]]):
        self.shown, self.layers = shown, layers

    def __repr__(self) -> str:
        return self.shown

    def logits(self, layer: int, hidden: Tensor) -> Tensor:
        """[B N] of hidden [B N C]. Raises ArgumentError if the layer has no router, or one for other channels."""
        if layer not in self.layers:
            raise ArgumentError(f"layer {layer} has no router; there are some for layers {sorted(self.layers)}")
        weight, bias = self.layers[layer]
        if weight.shape[0] != hidden.shape[-1]:
            raise ArgumentError(f"layer {layer}'s router is for {weight.shape[0]} channels, not {hidden.shape[-1]}")
        x = precise(hidden)
        return x @ weight.to(x.device, x.dtype) + bias.to(x.device, x.dtype)


@register("prune", "mixture_of_depths")
@dataclass(frozen=True)
class MixtureOfDepths(VisualCut):
    """The visual tokens with the largest router weights go through a layer; the others go around it and are back.

    Zhang, Meng, Qi, Huang, Wu, Wang: "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay", ICCV 2025,
    arXiv 2412.04449. For models that were trained so: routers come from the checkpoint. A visual token x of a layer
    weighs w = 1 + gain tanh(router(x)). As in the released code w scales what the MLP (not the attention) adds to a
    token that goes through, and a token itself that goes around; text always goes through, unscaled. Tokens keep their
    positions; the layer's cache holds those that went through. Steps behind the prefill run every layer as it is.

    Layer l of L keeps a share max(cos(pi l / (L-1)) / 2 + 1/2, floor) of the visual tokens, rounded down, if without
    the floor that is at most `ceiling`: of 32 layers 8 to 31, the last 8 at the floor.

    routers   path of a safetensors file, or a dict of tensors, with names such as "model.layers.8.router.weight", of
              [C] or [1 C], and "model.layers.8.router.bias", of [1] or []: the part behind the number of the layer has
              "router" in it, other names are left aside. No bias is 0. Best on the model's device. Reported where the
              layer is, as a refusal: a router that is missing or has another number of channels
    keep      one share for all these layers instead of the schedule; None
    floor     the least share of the schedule; 0.15
    ceiling   the share of the schedule from which on layers stay as they are; 0.85
    gain      how far a weight may be from 1; 0.2
    layers    None is those that `ceiling` leaves; others have the share that the schedule gives them, or `keep`
    """

    routers: Any = None
    keep: float | None = None
    floor: float = 0.15
    ceiling: float = 0.85
    gain: float = 0.2

    needs = ("visual",)
    probe = "next"
    skips = True

    def __post_init__(self) -> None:
        check_fraction(self.name, "keep", self.keep)
        for name, value in (("floor", self.floor), ("ceiling", self.ceiling), ("gain", self.gain)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
                raise ArgumentError(f"{self.name}({name}={value!r}): a number in [0, 1]")
        if not isinstance(self.routers, Routers):
            object.__setattr__(self, "routers", _imported(self.name, self.routers))

    def share(self, layer: int, depth: int) -> float:
        """The cosine of the schedule, without floor and ceiling."""
        return math.cos(math.pi * layer / max(depth - 1, 1)) / 2 + 0.5

    def default_layers(self, depth: int) -> list[int]:
        return [layer for layer in range(depth) if self.share(layer, depth) <= self.ceiling]

    def left(self, place: Place) -> Any:
        share = max(self.share(place.layer, place.depth), self.floor) if self.keep is None else self.keep
        return int(share * place.free)

    def score(self, site: Site) -> Tensor:
        logits: Tensor = self.routers.logits(site.layer, site.hidden)
        return logits

    def weigh(self, site: Site) -> Tensor:
        weight = 1 + self.gain * torch.tanh(self.score(site))
        rows = site.candidates()
        return torch.ones_like(weight).scatter(1, rows, weight.gather(1, rows))


def _imported(method: str, given: Any) -> Routers:
    """Routers from a path or from tensors by name. Raises ArgumentError for what is neither, or holds none."""
    wanted = 'a safetensors file or a dict, tensors such as "layers.8.router.weight" [C] and "layers.8.router.bias" [1]'
    shown, tensors = imported(method, "routers", given, wanted)
    found: dict[tuple[int, str], Tensor] = {}
    for name, tensor in tensors.items():
        match = NAMES.fullmatch(str(name))
        if match is not None:
            number, part = int(match[1]), match[2]
            flat = tensor.detach().reshape(-1)
            if (number, part) in found or max(tensor.shape, default=1) != flat.numel() or tensor.dim() > 2:
                raise ArgumentError(f"{method}: {name} of shape {list(tensor.shape)} is not one layer's only {part}")
            if part == "bias" and flat.numel() != 1:
                raise ArgumentError(f"{method}: {name} has {flat.numel()} numbers, not one")
            found[number, part] = flat if part == "weight" else flat[0]
    layers = {n: (w, found.get((n, "bias"), w.new_zeros(()))) for (n, part), w in found.items() if part == "weight"}
    if not layers:
        raise ArgumentError(f"{method}(routers={shown}): no router in it. {wanted}")
    return Routers(shown, layers)
