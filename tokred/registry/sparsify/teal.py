"""TEAL: input channels of linear layers whose activations are small are not read."""

from __future__ import annotations

from dataclasses import dataclass

from tokred.errors import ArgumentError
from tokred.registry.allocation import last_share, share_along
from tokred.registry.neurons import Neurons, Threshold
from tokred.registry.register import register


@register("sparsify", "teal")
@dataclass(frozen=True, kw_only=True)
class Teal(Threshold):
    """Multiply, in every linear layer of attentions and MLPs, only the input channels that are larger than a threshold.

    Liu, Ponnusamy, Cai, Guo, Kim, Athiwaratkun: "Training-Free Activation Sparsity in Large Language Models", 2024,
    arXiv 2408.14690: y = W S_t(x) with S_t(x) = x where |x| > t, else 0. Linears that share an input (q,
    k and v; gate and up) share its threshold. t is a quantile of |x| over a calibration set; the released
    code takes it from a signed histogram and assumes a mean of zero. LoRA branches read their whole input. Embeddings
    and the output head are left alone.

    With allocation="greedy" (algorithm 1) the linears of a layer have shares of their own, which together leave out
    `sparsity` of the layer's bytes. They are raised from 0, at each step where the layer's output then has the least
    squared error; layers have the same sparsity. tokred.calibrate(recipe="teal(allocation='greedy')") does that once
    for every sparsity; with another calibration it is refused. The paper allots a share to each matrix, here those
    that share an input have one; it weighs k and v as in one model, here bytes weigh; its steps are smaller.

    sparsity    the share of channels left out, in [0, 1); 0.5
    allocation  "uniform": the same share at every linear, as in the released kernels; or "greedy"
    threshold   the same t everywhere instead; needs no calibration
    phase       "decode" (one token a sequence; prompts stay dense) or "masked" (every token, to measure quality; the
                paper leaves the first tokens dense)
    layers      None is all of them
    """

    allocation: str = "uniform"

    acts_at = ("qkv", "out", "up", "down")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation not in ("uniform", "greedy"):
            raise ArgumentError(f"{self.name}(allocation={self.allocation!r}): one of 'uniform', 'greedy'")
        if self.allocated and self.threshold is not None:
            raise ArgumentError(f"{self.name}: give one of allocation='greedy' and threshold")

    @property
    def allocated(self) -> bool:  # type: ignore[override]
        return self.allocation == "greedy"

    def share_at(self, place: Neurons) -> float:
        if not self.allocated or self.share == 0:
            return self.share
        assert place.shares is not None
        return share_along(place.shares, self.share)

    def lacks(self, place: Neurons) -> str:
        if not self.allocated or self.share == 0:
            return ""
        if place.shares is None:
            how = f"calibration=tokred.calibrate(model, batches, recipe=\"{self.name}(allocation='greedy')\")"
            shared = "one that has some of its weights in common with another gets none"
            return f"the calibration allocates no shares to the linears of this layer ({shared}): {how}"
        if self.share > last_share(place.shares):
            return f"the allocation to this layer ends where {last_share(place.shares):.0%} is left out"
        return ""
