"""What a language model is worth: perplexity, and what counting tokens alone would give. Any callable will do."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.demo.language.data import VOCABULARY, windows

__all__ = ["Model", "baselines", "bits_per_byte", "perplexity"]

Model = Callable[..., Any]  # called with input_ids [B N]; gives something with logits [B N V]


@torch.no_grad()
def perplexity(model: Model, tokens: Tensor, batch: int = 8, window: int = 256, number: int | None = None) -> float:
    """The perplexity per token of `tokens` [T], read in windows of `window` that know nothing of one another.

    `number` windows evenly spaced, or as many as do not overlap. Where `batch` does not divide their number the last
    call is smaller (a compiled model compiles once more). Raises ValueError where not one window fits.
    """
    pieces = windows(tokens, (len(tokens) - 1) // window if number is None else number, window)
    total = 0.0
    for part in pieces.split(batch):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / pieces[:, 1:].numel())


def bits_per_byte(perplexity: float, tokens: int, size: int) -> float:
    """What `perplexity` per token means for a text of `size` bytes in `tokens` tokens, whatever the tokeniser."""
    return math.log2(perplexity) * tokens / size


def baselines(train: Tensor, held_out: Tensor) -> dict[str, float]:
    """The perplexity on `held_out` [T] of counts in `train` [S]: of tokens, and of pairs backed by them.

    unigram: one added to each count. bigram: 0.75 taken off each pair's count, and the mass so won given to the
    unigram (absolute discounting, Ney, Essen and Kneser 1994).
    """
    counts = train.bincount(minlength=VOCABULARY).double()
    alone = (counts + 1) / (counts.sum() + VOCABULARY)
    pairs, often = (train[:-1] * VOCABULARY + train[1:]).unique(return_counts=True)
    first = pairs // VOCABULARY
    total = torch.zeros(VOCABULARY).double().scatter_add(0, first, often.double())
    kinds = first.bincount(minlength=VOCABULARY)
    wanted = held_out[:-1] * VOCABULARY + held_out[1:]
    place = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    seen = torch.where(pairs[place] == wanted, often[place].double() - 0.75, 0.0)
    before, said = held_out[:-1], held_out[1:]
    both = (seen + 0.75 * kinds[before] * alone[said]) / total[before].clamp(min=1)
    both = torch.where(total[before] > 0, both, alone[said])
    means = {"unigram": alone[said].log().mean(), "bigram": both.log().mean()}
    return {name: math.exp(-mean.item()) for name, mean in means.items()}
