"""Checks of a method that puts imported learners in the place of MLPs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokred.backend import backend, reports, reset
from tokred.registry.sparsify.adaptive_width import AdaptiveWidth
from tokred.testing.neurons import TinyGated

__all__ = ["check_learners"]

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-4}  # of the largest number


def check_learners(method: AdaptiveWidth) -> None:
    """What `check_method` promises of such a method, in a small decoder of 3 layers and 32 channels."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            _check_model(method, TinyGated().to(dtype).eval(), dtype)
    finally:
        torch.random.set_rng_state(state)


def _check_model(method: AdaptiveWidth, model: nn.Module, dtype: torch.dtype) -> None:
    ids = torch.randint(0, 50, (3, 11))
    with torch.no_grad():
        dense = model(ids)
        assert torch.equal(_compiled(replace(method, layers=[]), model)(ids), dense), f"{method}: layers=[] acts"
    masked = _compiled(method, model)(ids)
    gradients = torch.autograd.grad(masked.float().square().mean(), list(model.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients), f"{method}: gradients are not finite"
    with torch.no_grad():
        compiled, others = _compiled(method, model), ids[1:].clone()
        for tensor in (ids, others):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        found = compiled(ids)
        acted = [block.layer for block in reports().graphs[0].blocks if block.method and not block.refusal]
        refused = {block.refusal.reason for block in reports().graphs[0].blocks if block.method and block.refusal}
        assert acted, f"{method} acts in no layer: {'; '.join(refused) or 'no site was offered'}"
        assert found.shape == dense.shape and found.isfinite().all(), f"{method}: the output is not finite"
        assert not torch.allclose(found, dense), f"{method} changes nothing"
        if dtype in CLOSE:  # in others rounding decides between numbers of learners
            _compare(found, masked.detach(), f"{method} in {dtype}: masked and by rows")
            _compare(compiled(others), found[1:], f"{method} in {dtype}: a sample alone")
        assert len(reports().graphs) == 1, f"{method}: {len(reports().graphs)} graphs for 2 batch sizes, not one"


def _compiled(method: AdaptiveWidth, model: nn.Module) -> Any:
    torch.compiler.reset()
    reset()
    chosen: dict[str, Any] = {"recipe": method, "exact": False, "lower": "aot_eager"}
    return torch.compile(model, backend=backend, options=chosen)


def _compare(found: Tensor, wanted: Tensor, what: str) -> None:
    error = float((found - wanted).abs().max() / wanted.abs().max())
    bound = CLOSE[wanted.dtype]
    assert error <= bound, f"{what}: off by {error:.2g} of the largest number, more than {bound:.0e}"
