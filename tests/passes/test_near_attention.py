"""What only looks like attention is untouched, and right when Inductor compiles it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import tokred
from tests.passes.near_attention import NEAR, Near
from tests.passes.rewriting import rewritten
from tokred.compiler.capture import capture
from tokred.passes.shield_softmax import shield_softmax

# Programs that stock Inductor 2.13 compiles to other numbers, or not at all.
MISREAD = [
    "over queries",
    "over queries, mul",
    "over queries, masked",
    "bmm over queries",
    "permuted, over queries",
    "exp over queries",
    "filled with 0",
    "code 2 hidden",
    "k stored [B M H D]",
    "tokens first",
    "SDPA, tokens first",
]


def as_tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("name", NEAR)
def test_the_matcher_says_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    near = NEAR[name]
    with caplog.at_level(logging.INFO, "tokred"):
        done = rewritten(near.function, *near.args)
    torch.testing.assert_close(done.result, done.expected)
    if near.code is None:
        assert done.softmaxes == 0
        assert "not made SDPA" not in caplog.text
    else:
        assert done.lines == []
        assert f"[{near.code}]" in caplog.text


def compile_all(programs: list[Near], **options: Any) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Many programs in one compilation: eager's results and those of the backend."""

    def everything(args: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        results: list[torch.Tensor] = []
        for near, own in zip(programs, args, strict=True):
            results += as_tuple(near.function(*own))
        return tuple(results)

    torch._dynamo.reset()
    counters.clear()
    args = [near.args for near in programs]
    with torch.no_grad():
        return everything(args), torch.compile(everything, backend="tokred", options=options, fullgraph=True)(args)


PARTS = 3
COMPILED = [
    name for name, near in NEAR.items() if near.code != "dtype"
]  # Inductor keeps bfloat16 intermediates in float32


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_inductor_compiles_them_rightly(part: int) -> None:
    expected, result = compile_all([NEAR[name] for name in COMPILED[part::PARTS]])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_compiles_them_rightly_without_exact_passes() -> None:
    expected, result = compile_all([NEAR[name] for name in MISREAD], exact=False)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["over queries", "code 2 hidden", "SDPA, tokens first"])
def test_inductor_compiles_it_rightly_alone(name: str) -> None:
    expected, result = compile_all([NEAR[name]])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_gradients_through_inductor() -> None:
    names = ["over queries", "over queries, mul", "bmm over queries", "exp over queries", "SDPA, tokens first"]

    def everything(args: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        results = [NEAR[name].function(*own) for name, own in zip(names, args, strict=True)]
        return torch.stack([x.square().mean() for x in results]).sum()

    torch._dynamo.reset()
    gradients = []
    for function in (everything, torch.compile(everything, backend="tokred")):
        args = [tuple(x.detach().clone().requires_grad_() for x in NEAR[name].args) for name in names]
        gradients.append(torch.autograd.grad(function(args), [x for own in args for x in own]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["SDPA, tokens first", "over queries", "exp over queries", "filled with 0"])
def test_the_shield_changes_no_bit(name: str) -> None:
    near = NEAR[name]
    graphs: list[Any] = []
    lines: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(shield_softmax(capture(gm, inputs), lines))
        return graphs[-1].forward

    torch._dynamo.reset()
    result = torch.compile(near.function, backend=backend)(*near.args)
    assert len(lines) == 1
    assert torch.equal(result, near.function(*near.args))
    assert shield_softmax(graphs[0], []) is graphs[0]  # once is enough


class Classifier(nn.Module):
    """A softmax that no product follows, gates that no product precedes, and SDPA in the usual layout."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.MultiheadAttention(8, 2, batch_first=True)
        self.router, self.head = nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encoder(x, x, x, need_weights=False)[0]
        gates = self.router(x).softmax(-1)
        return (self.head(x) * gates.amax(-1, keepdim=True)).softmax(-1)


def test_nothing_to_shield_is_no_change() -> None:
    graphs: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        captured = capture(gm, inputs)
        graphs.append((captured, shield_softmax(captured, [])))
        return captured.forward

    torch._dynamo.reset()
    torch.compile(Classifier().train(), backend=backend)(torch.randn(2, 4, 8))
    assert graphs
    assert all(before is after for before, after in graphs)


@pytest.mark.slow
def test_training_dropout_is_left_to_inductor(caplog: pytest.LogCaptureFixture) -> None:
    """It is attention, in the spelling of the templates, and the random numbers are Inductor's anyway."""

    def before(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = (q @ k.transpose(-2, -1) / 3.0).softmax(-1)
        return nn.functional.dropout(weights, 0.5, True) @ v

    tokred.reset()
    torch._dynamo.reset()
    args = [torch.randn(2, 2, 64, 8) for _ in range(3)]
    with caplog.at_level(logging.INFO, "tokred"):
        result = torch.compile(before, backend="tokred")(*args)
    assert "[dropout]" in caplog.text
    assert [
        p.changes for p in tokred.reports().graphs[0].passes if p.name in ("canonical_attention", "shield_softmax")
    ] == [0, 0]
    without = nn.functional.scaled_dot_product_attention(*args, scale=1 / 3)
    assert not torch.allclose(result, without)
