"""TEAL: input channels of linear layers whose activations are small are not read."""

from __future__ import annotations

from dataclasses import dataclass

from tokred.registry.neurons import Threshold
from tokred.registry.register import register


@register("sparsify", "teal")
@dataclass(frozen=True)
class Teal(Threshold):
    """Multiply, in every linear layer of attentions and MLPs, only the input channels that are larger than a threshold.

    Liu, Ponnusamy, Cai, Guo, Kim, Athiwaratkun: "Training-Free Activation Sparsity in Large Language Models", 2024,
    arXiv 2408.14690: y = W S_t(x) with S_t(x) = x where |x| > t, else 0. Linears that share an input (q,
    k and v; gate and up) share its threshold. t is the `sparsity` quantile of |x| over a calibration set; the released
    code takes it from a signed histogram and assumes a mean of zero. All layers have the same sparsity, as in the
    released kernels. LoRA branches read their whole input. Embeddings and the output head are left alone.

    sparsity    the share of channels left out, in [0, 1); 0.5
    threshold   the same t everywhere instead; needs no calibration
    phase       "decode" (one token a sequence; prompts stay dense) or "masked" (every token, to measure quality; the
                paper leaves the first tokens dense)
    layers      None is all of them
    """

    acts_at = ("qkv", "out", "up", "down")
