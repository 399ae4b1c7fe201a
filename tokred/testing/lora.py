"""Checks of a method that folds low-rank branches into linears: the model computes what it did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokred.backend import backend, reports, reset
from tokred.registry.sparsify.lora_prune import LoraPrune
from tokred.testing.neurons import TinyGated

__all__ = ["GatedLora", "check_lora"]

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 6e-2}  # of the largest number


class GatedLora(nn.Module):
    """A linear with a low-rank branch of four ranks beside it, the gates of which close two. [.. I] -> [.. O]."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)
        self.gate = nn.Parameter(torch.tensor([0.5, 0.0, 2.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.gate * self.down(x)) * 2.0
        return y


def check_lora(method: LoraPrune) -> None:
    """What `check_method` promises of such a method."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        for dtype in CLOSE:
            _check_model(method, dtype)
    finally:
        torch.random.set_rng_state(state)


def _check_model(method: LoraPrune, dtype: torch.dtype) -> None:
    model = TinyGated()
    block: Any
    for block in model.blocks:
        block.out, block.mlp.up = GatedLora(block.out), GatedLora(block.mlp.up)
    model.to(dtype).eval()
    torch.compiler.reset()
    reset()
    chosen: dict[str, Any] = {"recipe": method, "exact": False, "lower": "aot_eager"}
    compiled: Any = torch.compile(model, backend=backend, options=chosen)
    ids = torch.randint(0, 50, (3, 11))
    for samples in (3, 2):
        some = ids[:samples].clone()
        torch._dynamo.maybe_mark_dynamic(some, 0)
        with torch.no_grad():
            _compare(compiled(some), model(some), f"{method} in {dtype}, {samples} samples")
    assert len(reports().graphs) == 1, f"{method}: {len(reports().graphs)} graphs for 2 batch sizes, not one"
    acted = [block.method for block in reports().graphs[0].blocks if block.method and not block.refusal]
    assert acted, f"{method} acts in no layer"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        _compare(compiled(ids), model(ids), f"{method} in {dtype}, with other weights")
    wanted = torch.autograd.grad(model(ids).float().square().mean(), list(model.parameters()))
    found = torch.autograd.grad(compiled(ids).float().square().mean(), list(model.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        _compare(ours, theirs, f"{method} in {dtype}: a gradient")


def _compare(found: Tensor, wanted: Tensor, what: str) -> None:
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
    bound = CLOSE[wanted.dtype]
    assert error <= bound, f"{what} is off by {error:.2g} of the largest number, more than {bound:.0e}"
