"""skip_block: layers do without their MLP, or their attention."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from tokred.errors import ArgumentError
from tokred.registry.method import check_fraction
from tokred.registry.register import register
from tokred.registry.skip import Skip

BLOCKS = ("mlp", "attention", "both")


@register("sparsify", "skip_block")
@dataclass(frozen=True)
class SkipBlock(Skip):
    """Leave out the MLP of some layers, their attention, or both: h + MLP(h) becomes h.

    Runwal, Pedapati, Chen: "From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in
    Transformers", 2024, arXiv 2402.01911: its ADA-DEFT learns a weight for each layer and skips the MLPs of those with
    small ones. Training is left out: say which layers, or give the weights. A norm or a scale behind the block goes
    with it. Keys and values of an attention that is left out are still cached, as the model counts tokens by caches.

    layers    which; None is all of them, and then weights are needed
    weights   a number for each layer of the model: those with the smallest are left out, of equal ones the first
    ratio     the share of the layers that weights leave out, rounded; 0.25
    blocks    "mlp", "attention" or "both"
    """

    weights: list[float] | tuple[float, ...] | None = None
    ratio: float | None = None
    blocks: str = "mlp"

    def __post_init__(self) -> None:
        if self.blocks not in BLOCKS:
            raise ArgumentError(f"{self.name}(blocks={self.blocks!r}): one of {', '.join(map(repr, BLOCKS))}")
        check_fraction(self.name, "ratio", self.ratio)
        if self.weights is None and (self.layers is None or self.ratio is not None):
            raise ArgumentError(
                f"{self.name}: say which layers, or give weights, of which ratio leaves out the smallest"
            )
        for weight in self.weights or ():
            if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not isfinite(weight):
                raise ArgumentError(f"{self.name}(weights={self.weights!r}): a number for each layer")

    def skips(self, kind: str, layer: int, depth: int, module: str) -> bool:
        if self.blocks not in (kind, "both") or not self.acts_on(layer, depth, module):
            return False
        if self.weights is None:
            return self.ratio is None
        weights = list(self.weights)
        if len(weights) != depth:
            raise ArgumentError(f"{self.name}: {len(weights)} weights for {depth} layers")
        smallest = sorted(range(depth), key=weights.__getitem__)
        return layer in smallest[: round((0.25 if self.ratio is None else self.ratio) * depth)]
