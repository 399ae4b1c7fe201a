"""random_neurons: leave out neurons by a draw that is the same in every run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokred.registry.grid import shuffled
from tokred.registry.method import check_int
from tokred.registry.neurons import Neurons, Sparsity, check_sparsity
from tokred.registry.register import register


@register("baseline", "random_neurons")
@dataclass(frozen=True)
class RandomNeurons(Sparsity):
    """Leave out neurons of MLPs at random. A baseline: what a sparse method must beat to be worth its calibration.

    A layer's set is the same for every token; it depends on the seed and on the layer alone.

    sparsity   the share of each MLP's neurons left out, in [0, 1)
    seed       another draw
    phase      "decode" (one token a sequence) or "masked" (every token); computed by masking in both, so never faster
    layers     None is all of them
    """

    sparsity: float = 0.5
    seed: int = 0

    acts_at = ("down",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.name, self.sparsity)
        check_int(self.name, "seed", self.seed)

    def idle(self, place: Neurons) -> bool:
        return self.sparsity == 0

    def masked(self, values: Tensor, place: Neurons) -> Tensor:
        draw = shuffled(values.shape[-1], self.seed, place.layer, values.device)
        left_out = round(self.sparsity * values.shape[-1])
        return torch.where(draw.argsort().argsort() >= left_out, values, 0.0)  # [F] ranks

    def words(self, place: Neurons) -> str:
        return f"{self.sparsity:.0%} of {place.size} neurons left out, by masking"
