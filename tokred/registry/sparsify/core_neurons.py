"""CoreInfer: a prompt chooses which neurons decode behind it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from torch import Tensor

from tokred.errors import ArgumentError
from tokred.registry.method import keep_fraction
from tokred.registry.neurons import Chosen, Neurons
from tokred.registry.register import register


@register("sparsify", "core_neurons")
@dataclass(frozen=True)
class CoreNeurons(Chosen):
    """Decode with the neurons of each MLP that fired most strongly for most tokens of the prompt, and with no others.

    Wang et al.: "CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive Sparse
    Activation", 2024, arXiv 2410.18311: its token-wise and sentence-wise core neurons; the neuron side of CoreMatching
    (ICML 2025, arXiv 2505.19235). A token's core are the largest `token_keep` of its positive activations, those that
    the last linear of the MLP reads; the prompt's are the `keep` F neurons that are in most of its tokens' cores,
    padding apart; of those in as many, the first. The prompt itself is computed with all neurons. The released code
    takes as many neurons of every token, that share of the mean number of positive ones; here it is the share of the
    token's own. Sets of other prompts that are like this one are left out.

    One set serves a whole batch: all its tokens vote together, and so a sample's text depends on the others. What a
    prompt chose goes with its cache, so other generations may come in between; this needs `tokred.compile`. Several
    tokens behind a cache (a prompt in parts, another turn) vote too, and are computed with all neurons. A cache that no
    compiled prompt filled is decoded with all of them, op by op.

    keep         the share of neurons that stay, rounded, at least one; 0.4
    ratio        the share left out instead
    token_keep   the share of a token's positive activations that are its core, rounded up; 0.2
    phase        "decode" (one token a sequence; prompts stay dense and vote) or "masked" (every token of a text, with
                 the set that this text chose, to measure quality)
    layers       None is those from 3/16 to 27/32 of the depth, of 32 layers 6 to 26, as in the released code
    """

    keep: float | None = None
    ratio: float | None = None
    token_keep: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        keep_fraction(self.name, self.keep, self.ratio, 0.4)
        number = isinstance(self.token_keep, (int, float)) and not isinstance(self.token_keep, bool)
        if not number or not 0 < self.token_keep <= 1:
            raise ArgumentError(f"{self.name}(token_keep={self.token_keep!r}): a share in (0, 1]")

    def default_layers(self, depth: int) -> list[int]:
        return list(range(round(depth * 6 / 32), round(depth * 27 / 32)))

    def kept(self, place: Neurons) -> int:
        return max(round(keep_fraction(self.name, self.keep, self.ratio, 0.4) * int(place.size)), 1)

    def votes(self, values: Tensor) -> Tensor:
        size = values.shape[-1]
        positive = (values > 0).sum(-1, keepdim=True)  # [.. 1]
        wanted = (self.token_keep * positive.double() - 1e-9).ceil().long()  # 0.28 of 25 are 7, not 7.000000000000001
        largest = values.topk(min(ceil(self.token_keep * size), size), dim=-1).values
        least = largest.gather(-1, (wanted - 1).clamp(min=0))  # the smallest activation in the token's core
        core: Tensor = (values >= least) & (values > 0)
        return core
