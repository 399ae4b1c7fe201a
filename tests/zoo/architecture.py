"""One row of the zoo: a real architecture, small and seeded, with what a reader of its source code counts in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Architecture", "Inputs", "images", "tensors_of", "tokens"]

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A model, its inputs and its ground truth.

    `attention` and `mlp` count the blocks that run in one forward, by hand: every attention (self, cross, pooling), and
    the feed-forward block of every layer. Prediction heads, projectors, patch, time and position embeddings are none.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]  # batch size -> keyword arguments of forward
    attention: int
    mlp: int
    self_attention_tokens: tuple[int, ...]  # every length that a self-attention's query axis may have
    tags: frozenset[str]
    why: str = ""  # what this row shows that others do not
    trained: bool = False  # real weights, not to be disturbed
    training: bool = False  # runs in train mode (its dropout is 0)
    float64: bool = True  # False where an operator of the model has no float64 kernel
    visual: tuple[int, int] | None = None  # where the image's tokens are, for models in whose graphs it does not show

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model, the same at every call.

        Random initialisation hides mistakes: zero position embeddings, LayerScale of 1e-5 and adaLN gates of 0 make
        whole blocks invisible in the output. Noise on every parameter makes every block count.
        """
        torch.manual_seed(0)
        model = self.build()
        if not self.trained:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.train(self.training).to(dtype)

    def example(self, batch: int = 2, dtype: torch.dtype = torch.float32) -> Inputs:
        """Inputs of that batch size, the same at every call; floating tensors get `dtype`."""
        torch.manual_seed(1)
        inputs: Inputs = tree_map_only(
            Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, self.inputs(batch)
        )
        return inputs


def images(size: int, name: str = "pixel_values") -> Callable[[int], Inputs]:
    """Random images [B 3 size size] under the keyword `name`."""
    return lambda batch: {name: torch.randn(batch, 3, size, size)}


def tokens(length: int, vocabulary: int = 96, mask: bool = True, padding: int = 0) -> Callable[[int], Inputs]:
    """Random token ids [B N]; `padding` is how many tokens at the end of every sample but the first are masked out."""

    def inputs(batch: int) -> Inputs:
        ids = torch.randint(5, vocabulary, (batch, length))
        if not mask:
            return {"input_ids": ids}
        attention_mask = torch.ones(batch, length, dtype=torch.long)
        if padding:
            attention_mask[1:, length - padding :] = 0
        return {"input_ids": ids, "attention_mask": attention_mask}

    return inputs


def tensors_of(output: object) -> list[Tensor]:
    """The tensors in whatever a model returned, in a fixed order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
