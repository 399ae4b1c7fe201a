"""Low-rank adapters as PEFT and SoRA write them, put beside every linear of a small model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.passes.sparse_models import linears

__all__ = ["RANK", "PeftLinear", "SoraLinear", "adapted"]

RANK = 4


class PeftLinear(nn.Module):
    """PEFT's layer around a linear or a Conv1D: adapters by name, added one after the other, in a type of their own.

    Of each adapter the last column of B is zero, so one of its ranks adds nothing.
    """

    def __init__(self, base: nn.Module, names: tuple[str, ...] = ("default",), dtype: torch.dtype | None = None):
        super().__init__()
        inputs, outputs = sizes(base)
        self.base_layer, self.active_adapters = base, list(names)
        self.lora_A, self.lora_B, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.scaling = {name: 2.0 / number for number, name in enumerate(names, start=1)}
        for name in names:
            self.lora_A[name] = nn.Linear(inputs, RANK, bias=False)
            self.lora_B[name] = nn.Linear(RANK, outputs, bias=False)
            self.lora_dropout[name] = nn.Dropout(0.1)
            nn.init.normal_(self.lora_B[name].weight, std=0.3)
            nn.init.zeros_(self.lora_B[name].weight[:, -1:])
        for part in (self.lora_A, self.lora_B):
            part.to(base.weight.dtype if dtype is None else dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        kind = result.dtype
        for name in self.active_adapters:
            x = x.to(self.lora_A[name].weight.dtype)
            result = result + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
        return result.to(kind)


class SoraLinear(nn.Module):
    """SoRA's: bare parameters, and a gate for each rank, of which training has set two to zero."""

    def __init__(self, base: nn.Module):
        super().__init__()
        inputs, outputs = sizes(base)
        kind = {"dtype": base.weight.dtype}
        self.base, self.scaling = base, 0.5
        self.lora_A = nn.Parameter(torch.randn(RANK, inputs, **kind) * inputs**-0.5)
        self.lora_B = nn.Parameter(torch.randn(outputs, RANK, **kind))
        self.gate = nn.Parameter(torch.tensor([[0.0, 1.5, 0.0, -0.5]], **kind))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + ((x @ self.lora_A.T).mul(self.gate) @ self.lora_B.T) * self.scaling
        return y


def sizes(base: Any) -> tuple[int, int]:
    """How many channels go in and come out."""
    first, second = base.weight.shape
    return (first, second) if isinstance(base, Conv1D) else (second, first)


def adapted(model: nn.Module, adapter: Callable[[nn.Module], nn.Module], only: str = "") -> Any:
    """`model` with an adapter in place of each linear of its attentions and MLPs whose name has `only` in it."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, module in linears(model).items():
            path, _, own = name.removesuffix(".weight").rpartition(".")
            if only in name:
                setattr(model.get_submodule(path), own, adapter(module))
    return model.eval().requires_grad_(False)
