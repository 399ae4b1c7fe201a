"""SoRA: ranks of low-rank branches that are zero are not computed, and the others become part of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from tokred.registry.method import Method, check_flag
from tokred.registry.register import register

__all__ = ["Branch", "Kept", "LoraPrune", "Merged"]


@register("sparsify", "lora_prune")
@dataclass(frozen=True)
class LoraPrune(Method):
    """Merge the low-rank branch beside a linear into its weight, or leave out the ranks that are zero: same numbers.

    Ding, Lv, Wang, Chen, Zhou, Liu, Sun: "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023,
    arXiv 2311.11696: y = W x + s B (g * A x), where training sets most of the gates g to zero; a rank whose gate, row
    of A or column of B is zero adds nothing. The paper takes these out once, after training; here the result follows
    the parameters. Branches without gates, as in LoRA, are those with g = 1. Exact: W' = W + s B diag(g) A is summed in
    float32 at least and rounded to W's type once, so float64 agrees to 1e-12 of the largest result, float32 to 1e-5,
    and bfloat16 as well as two orders of its sums do. There what is smaller than a 256th of W is rounded away, as in
    every merged adapter; merge=False keeps it.

    Dropout in training, and a gradient that is wanted of the weight or the branch, are refused where they are.

    merge   True: one weight, which is held beside the parameters, a second time. False: the branch stays, with fewer
            ranks, gate and scale in B; only these are held a second time. Where parameters change so that more ranks
            are not zero than when the model was compiled, that runs uncompiled, and a warning says so
    layers  None is all of them, and linears outside of attentions and MLPs; or by a glob on the linear's own name
    """

    merge: bool = True

    def __post_init__(self) -> None:
        check_flag(self.name, "merge", self.merge)


# -- what is made of the parameters -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Branch:
    """How one branch's parameters are to be read: A, B, then the gates.

    scale    s
    gates    how many parameters make up g, of one number, or one for each rank
    down     whether A is [R I], as nn.Linear's weight; False for [I R]
    up       whether B is [O R]; False for [R O]
    """

    scale: float
    gates: int = 0
    down: bool = True
    up: bool = True

    @property
    def operands(self) -> int:
        return 2 + self.gates

    def factors(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A' [K I] and B' [O K] in `dtype`, of the K ranks that are not zero: B' A' = s B diag(g) A."""
        down, up, *gates = parameters
        down, up = down if self.down else down.t(), up if self.up else up.t()
        gate = reduce(torch.mul, (g.reshape(-1).to(dtype) for g in gates), torch.ones_like(down[:, 0], dtype=dtype))
        kept = (gate != 0) & (down != 0).any(1) & (up != 0).any(0)  # [R]
        return down[kept].to(dtype), up[:, kept].to(dtype) * (self.scale * gate[kept])


@dataclass(frozen=True)
class Merged:
    """W + s B diag(g) A of W, then the parameters of each branch. `rows`: W is [O I], else [I O]."""

    branches: tuple[Branch, ...]
    rows: bool = True

    def __call__(self, weight: Tensor, *parameters: Tensor) -> Tensor:
        dtype = precise(weight, *parameters)
        total = weight.to(dtype)
        for branch in self.branches:
            down, up = branch.factors(parameters[: branch.operands], dtype)
            parameters = parameters[branch.operands :]
            product = up @ down
            total = total + (product if self.rows else product.t())
        return total.to(weight.dtype)


@dataclass(frozen=True)
class Kept:
    """A' [K I], or B' [O K], of one branch's parameters, in the type of A or B.

    ranks   how many at least: zeros make up for ranks that are gone
    up      whether it is B'
    """

    branch: Branch
    ranks: int
    up: bool

    varies: ClassVar[bool] = True

    def __call__(self, *parameters: Tensor) -> Tensor:
        down, up = self.branch.factors(parameters, precise(*parameters))
        lacking = max(self.ranks - len(down), 0)
        if self.up:
            return torch.nn.functional.pad(up, (0, lacking)).to(parameters[1].dtype)
        return torch.nn.functional.pad(down, (0, 0, 0, lacking)).to(parameters[0].dtype)


def precise(*parameters: Tensor) -> torch.dtype:
    """The widest type among these, float32 at least."""
    return reduce(torch.promote_types, (parameter.dtype for parameter in parameters), torch.float32)
