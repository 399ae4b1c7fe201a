"""Adaptive computation modules: an MLP becomes a few small ones, of which each token gets as many as its gate says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from tokred.backends.kernels.learners import ACTIVATIONS, masked_learners, nested_learners
from tokred.errors import ArgumentError
from tokred.registry.imported import imported
from tokred.registry.method import Method
from tokred.registry.register import register

__all__ = ["AdaptiveWidth", "Learners"]

NAMES = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:.*\.)?((?:learners|gate)\.(?:up|down)\.(?:weight|bias))")
PARTS = ("learners.up", "learners.down", "gate.up", "gate.down")
WANTED = (
    'a safetensors file or a dict, of tensors such as "layers.3.learners.up.weight" [N F C], ".bias" [N F], '
    '"layers.3.learners.down.weight" [N C F], ".bias" [N C], "layers.3.gate.up.weight" [G C], ".bias" [G], and '
    '"layers.3.gate.down.weight" [N+1 G], ".bias" [N+1]'
)


@dataclass(frozen=True, eq=False)
class Learners:
    """The N learners of one layer and their gate.

    up, down  [N F C] both, with biases [N F] and [N C]: learner n is act(x up[n]^T + up_bias[n]) down[n] + down_bias[n]
    gate      two linears [G C] and [N+1 G] with biases: of the second's outputs the largest is at the number of
              learners that a token gets
    """

    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    gate: tuple[Tensor, ...]

    @property
    def channels(self) -> int:
        return self.up.shape[2]

    def at(self, like: Tensor) -> Learners:
        """The same on the device of another tensor and in its type."""
        own = (self.up, self.up_bias, self.down, self.down_bias, *self.gate)
        up, up_bias, down, down_bias, *gate = (part.to(like.device, like.dtype) for part in own)
        return Learners(up, up_bias, down, down_bias, tuple(gate))

    def counts(self, rows: Tensor, activation: str) -> Tensor:
        """[T] in 0..N for rows [T C]."""
        up, up_bias, down, down_bias = self.gate
        return linear(ACTIVATIONS[activation](linear(rows, up, up_bias)), down, down_bias).argmax(-1)

    def compute(self, x: Tensor, activation: str, gate_activation: str, *, masked: bool) -> Tensor:
        """[.. C] of [.. C]. `masked`: by the definition, which has gradients; else by the operator."""
        rows = x.reshape(-1, x.shape[-1])
        counts = self.counts(rows, gate_activation)
        function = masked_learners if masked else nested_learners
        y: Tensor = function(rows, counts, self.up, self.up_bias, self.down, self.down_bias, activation)
        return y.reshape(x.shape)


class Imported:
    """Learners by layer, as a recipe shows them; in each type that was asked for they are kept once."""

    def __init__(self, shown: str, layers: dict[int, Learners]):
        self.shown, self.layers = shown, layers
        self._at: dict[Any, Learners] = {}

    def __repr__(self) -> str:
        return self.shown

    def at(self, layer: int, like: Tensor) -> Learners:
        """Raises ArgumentError if the layer has none, or some for other channels than `like` [.. C]."""
        if layer not in self.layers:
            raise ArgumentError(f"layer {layer} has no learners; there are some for layers {sorted(self.layers)}")
        found = self.layers[layer]
        if found.channels != like.shape[-1]:
            raise ArgumentError(f"layer {layer}'s learners are for {found.channels} channels, not {like.shape[-1]}")
        key = (layer, like.device, like.dtype)
        if key not in self._at:
            self._at[key] = found.at(like)
        return self._at[key]


@register("sparsify", "adaptive_width")
@dataclass(frozen=True)
class AdaptiveWidth(Method):
    """A gate gives each token the first few of N small MLPs, whose sum stands in the place of a layer's MLP.

    Wójcik, Devoto, Pustelnik, Minervini, Scardapane: "Adaptive Computation Modules: Granular Conditional Computation
    For Efficient Inference", AAAI 2025, arXiv 2312.10193: y is the sum of the first k(x) learners, where of the gate's
    N + 1 outputs number k(x) is the largest. In the released code the last of the k is left out; here, as in the paper,
    it runs. For models that were trained so: learners are distilled from the MLP, then the gate is trained, and neither
    is done here, so without such weights the method is of no use. The paper does the same to the linears of attentions,
    which are left alone here.

    Which tokens get how many learners only the data tell. On CPU each learner runs on the tokens that want it alone;
    on other devices, and where gradients are wanted, all run and are masked, which is no faster than the model was.

    learners         path of a safetensors file, or a dict of tensors, with names such as
                     "model.layers.3.mlp.learners.up.weight" [N F C], "..learners.down.weight" [N C F],
                     "..gate.up.weight" [G C] and "..gate.down.weight" [N+1 G], and for each of these ".bias" ([N F],
                     [N C], [G], [N+1]; none is 0); other names are left aside. Kept in the model's type, on its device
    activation       of the learners: "gelu", "relu" or "silu"
    gate_activation  of the gate, the same
    layers           None is those that have learners. One without, or one of another number of channels, is a refusal
    """

    learners: Any = None
    activation: str = "gelu"
    gate_activation: str = "gelu"

    def __post_init__(self) -> None:
        for name in ("activation", "gate_activation"):
            if getattr(self, name) not in ACTIVATIONS:
                raise ArgumentError(f"{self.name}({name}={getattr(self, name)!r}): one of {', '.join(ACTIVATIONS)}")
        if not isinstance(self.learners, Imported):
            object.__setattr__(self, "learners", _imported(self.name, self.learners))

    def default_layers(self, depth: int) -> list[int]:
        return sorted(self.learners.layers)

    def at(self, layer: int, like: Tensor) -> Learners:
        """Those of one layer for values [.. C]. Raises ArgumentError if there are none, or for other channels."""
        found: Learners = self.learners.at(layer, like)
        return found


def _imported(method: str, given: Any) -> Imported:
    """Learners from a path or from tensors by name. Raises ArgumentError for what is neither, or does not fit."""
    shown, tensors = imported(method, "learners", given, WANTED)
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = NAMES.fullmatch(str(name))
        if match is not None:
            parts = found.setdefault(int(match[1]), {})
            if match[2] in parts:
                raise ArgumentError(f"{method}: {name} is layer {match[1]}'s second {match[2]}")
            parts[match[2]] = tensor.detach()
    if not found:
        raise ArgumentError(f"{method}(learners={shown}): no learners in it. {WANTED}")
    return Imported(shown, {layer: _checked(method, layer, parts) for layer, parts in found.items()})


def _checked(method: str, layer: int, parts: dict[str, Tensor]) -> Learners:
    """One layer's tensors, put together. Raises ArgumentError for one that lacks, or whose shape does not fit."""
    lacking = [part for part in PARTS if f"{part}.weight" not in parts]
    if lacking:
        raise ArgumentError(f"{method}: layer {layer} lacks {lacking[0]}.weight. {WANTED}")
    up, gate = parts["learners.up.weight"], parts["gate.up.weight"]
    if up.dim() != 3 or 0 in up.shape or gate.dim() != 2:
        raise ArgumentError(f"{method}: layer {layer}: learners.up.weight is {list(up.shape)}, not [N F C]. {WANTED}")
    (number, neurons, channels), width = up.shape, gate.shape[0]
    sizes = {
        "learners.up": (number, neurons, channels),
        "learners.down": (number, channels, neurons),
        "gate.up": (width, channels),
        "gate.down": (number + 1, width),
    }
    biases = {part: (size[0], size[1]) if part.startswith("learners") else size[:1] for part, size in sizes.items()}
    for part, size in sizes.items():
        bias = parts.setdefault(f"{part}.bias", up.new_zeros(biases[part]))
        for name, tensor, wanted in (("weight", parts[f"{part}.weight"], size), ("bias", bias, biases[part])):
            if tuple(tensor.shape) != wanted:
                told = f"{part}.{name} is {list(tensor.shape)}, not {list(wanted)}"
                raise ArgumentError(f"{method}: layer {layer}: {told}, as its {number} learners have it")
    down = parts["learners.down.weight"].transpose(1, 2).contiguous()
    gates = tuple(parts[f"gate.{part}"] for part in ("up.weight", "up.bias", "down.weight", "down.bias"))
    return Learners(up, parts["learners.up.bias"], down, parts["learners.down.bias"], gates)
