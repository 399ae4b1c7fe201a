"""Run a program through capture and the attention passes, and look at both the graph and the numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokred.compiler.capture import capture
from tokred.passes.canonical_attention import canonical_attention
from tokred.passes.match_attention import SOFTMAX

SDPA = torch.ops.aten.scaled_dot_product_attention.default


@dataclass
class Rewritten:
    """What the pass made of a program, and what the program and the new graph compute."""

    before: list[fx.GraphModule] = field(default_factory=list)
    after: list[fx.GraphModule] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    expected: Any = None
    result: Any = None

    @property
    def calls(self) -> list[fx.Node]:
        return [node for gm in self.after for node in gm.graph.nodes if node.target is SDPA]

    @property
    def softmaxes(self) -> int:
        return sum(node.target in SOFTMAX for gm in self.after for node in gm.graph.nodes)


def rewritten(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = None, grad: bool = False, **kwargs: Any
) -> Rewritten:
    """Compile `function` with nothing but the pass, and run it beside eager."""
    done = Rewritten()

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured = capture(gm, inputs)
        new = canonical_attention(captured, done.lines)
        assert (new is captured) == (not done.lines)
        new.graph.lint()
        done.before.append(captured)
        done.after.append(new)
        return new.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        done.expected = function(*args, **kwargs)
        done.result = torch.compile(function, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return done


def assert_exact(done: Rewritten, tolerance: float = 1e-10) -> None:
    """The same numbers (NaN for NaN), shapes, dtypes and memory layout."""
    torch.testing.assert_close(done.result, done.expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)
