"""The zoo by itself, without tokred: its ground truth is what runs, and every model gives the same result each time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.zoo.architecture import Architecture, tensors_of
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.measure import difference, outputs_of

# Softmaxes that are no attention of their own: the experts' routers, and ConViT's second softmax in a gated layer.
OTHER_SOFTMAXES = {"mixtral": 3, "qwen3_moe": 2, "timm_convit": 2}

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=list(ARCHITECTURES))


class _CountAttention(TorchFunctionMode):
    """Counts the calls that compute attention. A mode keeps nn.TransformerEncoder from its fused operator."""

    NAMES = ("scaled_dot_product_attention", "softmax", "multi_head_attention_forward")

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.NAMES:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@each_architecture
def test_the_ground_truth_is_what_runs_and_every_time_the_same(architecture: Architecture) -> None:
    """For every batch; and float64 agrees with float32."""
    first, second = architecture.model(), architecture.model()
    with _CountAttention() as count:
        single = outputs_of(first, architecture.example())
    assert count.calls.total() - OTHER_SOFTMAXES.get(architecture.name, 0) == architecture.attention
    for batch in (1, 3):
        one, two = (outputs_of(model, architecture.example(batch)) for model in (first, second))
        assert one
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert all(bool(tensor.isfinite().all()) for tensor in one)
    if not architecture.float64:
        with pytest.raises(RuntimeError):
            outputs_of(architecture.model(torch.float64), architecture.example(dtype=torch.float64))
        return
    double = outputs_of(architecture.model(torch.float64), architecture.example(dtype=torch.float64))
    assert any(tensor.dtype == torch.float64 for tensor in double)
    assert difference([tensor.to(d.dtype) for tensor, d in zip(single, double, strict=True)], double) < 1e-4


def test_tensors_of_a_nested_output_and_the_size_of_the_zoo() -> None:
    assert tensors_of({"a": torch.ones(1), "b": [torch.zeros(2), "text"]})[1].shape == (2,)
    assert len(ARCHITECTURES) >= 50
