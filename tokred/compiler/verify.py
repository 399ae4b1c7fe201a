"""`verify=True`: before a compiled graph is trusted, its first real input is run through every stage and compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tokred.compiler.report import GraphReport
from tokred.errors import VerifyError

__all__ = ["verified"]

# What an exact stage may change, relative to the largest value: rounding of another order of summation.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def verified(
    compiled: Callable[..., Any], stages: list[tuple[str, fx.GraphModule]], report: GraphReport
) -> Callable[..., Any]:
    """Wrap a compiled graph: its first call compares each exact stage with the one before, the result with the last.

    The call raises VerifyError with the first stage that differs. Random ops (dropout in training) make stages differ.
    """
    lossy = {entry.name for entry in report.passes if not entry.exact}
    pending = True

    def call(*inputs: Any) -> Any:
        nonlocal pending
        if not pending:
            return compiled(*inputs)
        pending = False
        before, name = None, ""
        for stage, graph in stages:
            takes = len(graph.graph.find_nodes(op="placeholder"))  # those that a later pass added are behind them
            results = _run(graph.forward, inputs[:takes])
            if before is not None and stage not in lossy:
                _compare(before, results, f"stage {stage!r} of {report.model} differs from {name!r}")
            before, name = results, stage
        outcome = _run(compiled, inputs)
        if before is not None:
            _compare(before, outcome, f"the compiled {report.model} differs from its graph after {name!r}")
        return compiled(*inputs)

    return call


def _run(function: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Any]:
    """Results on copies of the inputs, so that stages that write in place do not see each other."""
    copies = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    with torch.no_grad():
        return list(function(*copies))


def _compare(left: list[Any], right: list[Any], what: str) -> None:
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        if not isinstance(a, torch.Tensor) or a.numel() == 0:
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            raise VerifyError(f"{what}: result {i} is {tuple(b.shape)} {b.dtype}, expected {tuple(a.shape)} {a.dtype}")
        if not a.dtype.is_floating_point:
            if not torch.equal(a, b):
                raise VerifyError(f"{what}: result {i} ({a.dtype}) is not equal")
            continue
        scale = a.abs().max().clamp(min=1e-6)
        error = ((a - b).abs().max() / scale).item()
        if not error <= TOLERANCE.get(a.dtype, 1e-4):
            raise VerifyError(
                f"{what}: result {i} is off by {error:.2g} relative (allowed {TOLERANCE.get(a.dtype, 1e-4):.0e})"
            )
