"""CATS: neurons of a gated MLP whose gate is nearly closed are not computed."""

from __future__ import annotations

from dataclasses import dataclass

from tokred.registry.neurons import Threshold
from tokred.registry.register import register


@register("sparsify", "cats")
@dataclass(frozen=True)
class Cats(Threshold):
    """Compute only the neurons of a gated MLP whose activated gate is larger than a threshold in magnitude.

    Lee, Lee, Zhang, Tiwari, Mirhoseini: "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models",
    COLM 2024, arXiv 2404.08763: down(C_t(act(gate x)) * up x) with C_t(v) = v if |v| > t else 0, where t is the
    `sparsity` quantile of |act(gate x)| over a calibration set, layer by layer. The gate is always dense; a neuron that
    is left out needs neither its row of `up` nor its column of `down`. MLPs without a gate are refused. The released
    code takes the quantile of a histogram on [-2, 2]; here it has bins for every magnitude.

    sparsity    the share of neurons left out, in [0, 1); 0.5
    threshold   the same t in every layer instead; needs no calibration
    phase       "decode" (one token a sequence; prompts stay dense) or "masked" (every token, to measure quality)
    layers      None is all of them, as in the paper
    """

    acts_at = ("gate",)
