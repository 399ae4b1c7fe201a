"""A model of one block, and its calibration."""

import torch
from torch import nn

import tokred

__all__ = ["GREEDY", "Small", "batch", "measured", "small"]

GREEDY = "teal(allocation='greedy')"


class Small(nn.Module):
    """One block: attention of one head, and a gated MLP."""

    def __init__(self, width=8, neurons=16):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, neurons, bias=False) for _ in range(2))
        self.down = nn.Linear(neurons, width, bias=False)

    def forward(self, x, attention_mask=None):
        q, k, v = (linear(x).unsqueeze(1) for linear in (self.q, self.k, self.v))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def small(seed=0, **sizes):
    torch.manual_seed(seed)
    return Small(**sizes).eval()


def batch(seed):
    return torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(seed))


def measured(model=None, seeds=(0, 1), recipe=None):
    return tokred.calibrate(
        small() if model is None else model, [batch(seed) for seed in seeds], recipe=recipe, progress=False
    )
