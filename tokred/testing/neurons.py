"""Checks of a method that leaves out neurons or input channels: of its masks, and in a small model with gated MLPs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from tokred.backend import backend, reports, reset
from tokred.calibrate import calibrate
from tokred.compiler.report import Report
from tokred.registry.allocation import STEP
from tokred.registry.neurons import Blockwise, Chosen, Neurons, Sparsity
from tokred.registry.sketch import Sketch
from tokred.testing.models import BLOCKS, WIDTH, CausalBlock, TinyDecoder

__all__ = ["TinyGated", "check_sparsity"]

SIZE = 96


class GatedMlp(nn.Module):
    """SwiGLU. [B N C] -> [B N C]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(silu(self.gate(x)) * self.up(x))
        return y


class TinyGated(TinyDecoder):
    """A language model with gated MLPs. ids [B N] -> logits [B N 50]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CausalBlock() for _ in range(BLOCKS))
        for block in self.blocks:
            block.mlp = GatedMlp()


def check_sparsity(method: Sparsity, nothing: Sparsity) -> None:
    """What `check_method` promises of such a method. `nothing` is the same method that leaves nothing out."""
    assert method.acts_at, f"{method} acts at no role: acts_at is empty"
    for role in method.acts_at:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            _check_mask(method, nothing, role, dtype)
    _check_model(replace(method, phase="masked"), replace(nothing, phase="masked"))


def _check_mask(method: Sparsity, nothing: Sparsity, role: str, dtype: torch.dtype) -> None:
    where = f"{method} at {role!r} in {dtype}"
    values = torch.randn(3, 5, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    sketch = Sketch()
    sketch.add(values)
    shares = tuple(STEP * k for k in range(96))  # as if each place of a layer had the same
    place = Neurons(1, 3, "module", role, SIZE, sketch, shares)
    assert nothing.idle(place), f"{nothing} should leave {role!r} alone, but idle() says that it does not"
    assert not method.idle(place), f"{where}: idle() says that it leaves nothing out"
    inputs = values.clone().requires_grad_()
    left = _left(method, inputs, place)
    assert left.shape == values.shape and left.dtype == dtype, (
        f"{where}: masked() gives {list(left.shape)} {left.dtype}"
    )
    assert torch.equal(inputs, values), f"{where}: masked() changed its input in place"
    assert ((left == values) | (left == 0)).all(), f"{where}: masked() changed numbers that it did not leave out"
    out = (left == 0).double().mean()
    assert 0 < out < 1, f"{where}: masked() leaves out {out:.0%}"
    assert torch.equal(left, _left(method, values, place)), f"{where}: two runs on the same input differ"
    for sample in range(0 if isinstance(method, Chosen) else 3):  # which lets the samples of a batch choose together
        alone = _left(method, values[sample : sample + 1], place, sample)
        assert torch.equal(alone, left[sample : sample + 1]), f"{where}: a sample's mask depends on its batch"
    (gradient,) = torch.autograd.grad(left.float().square().sum(), inputs)
    assert gradient.isfinite().all(), f"{where}: gradients are not finite"


def _left(method: Sparsity, values: Tensor, place: Neurons, first: int = 0) -> Tensor:
    """What the method leaves of some samples' values, of which `first` is the number of the first."""
    if not isinstance(method, Blockwise):
        return method.masked(values, place)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, WIDTH, generator=generator)[first : first + len(values)].to(values.dtype)
    gate, up = torch.randn(2, SIZE, WIDTH, generator=generator).to(values.dtype)
    labels, centres = method.prepare(gate, up)
    again, _ = method.prepare(gate, up)
    assert torch.equal(labels, again), f"{method}: prepare() makes other blocks in another run"
    wanted = (method.blocks(SIZE), WIDTH)
    assert labels.dtype == torch.int64 and labels.shape == (SIZE,) and centres.shape == wanted, (
        f"{method}: prepare() gives {list(labels.shape)} {labels.dtype} and {list(centres.shape)} for {SIZE} neurons"
    )
    return method.blocks_masked(values, x, labels, centres)


def _check_model(method: Sparsity, nothing: Sparsity) -> None:
    torch.manual_seed(0)
    model = TinyGated().eval()
    ids = torch.randint(0, 50, (2, 11))
    options: dict[str, Any] = {"exact": False, "lower": "eager"}
    if method.calibrated:
        options["calibration"] = calibrate(model, [ids], recipe=method, progress=False)
    expected = model(ids)
    with torch.no_grad():
        for still in (nothing, replace(method, phase="decode")):
            got, _ = _run(model, still, ids, options)
            assert torch.equal(got, expected), f"{still} changes a prompt"
    got, report = _run(model, method, ids, options)
    acted = [block.layer for graph in report.graphs for block in graph.blocks if block.method and not block.refusal]
    refused = {block.refusal.reason for graph in report.graphs for block in graph.blocks if block.refusal}
    assert acted, f"{method} acts in no layer: {'; '.join(refused) or 'no site was offered'}"
    assert got.shape == expected.shape and got.isfinite().all(), f"{method}: the output is not finite"
    assert not torch.allclose(got, expected), f"{method} changes nothing"
    gradients = torch.autograd.grad(got.square().mean(), list(model.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients), f"{method}: gradients are not finite"


def _run(model: nn.Module, method: Sparsity, ids: Tensor, options: dict[str, Any]) -> tuple[Tensor, Report]:
    torch.compiler.reset()
    reset()
    chosen: dict[str, Any] = {**options, "recipe": method}
    compiled: Any = torch.compile(model, backend=backend, options=chosen)
    return compiled(ids), reports()
