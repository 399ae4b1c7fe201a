"""Greedy diversity: k of N rows, chosen one after the other so that they resemble each other little. One operator.

Written as ATen it would be k dependent steps of a graph, several launches each. Here it is one node: on CUDA one Triton
program a sample (greedy_triton.py), on CPU a loop in C++ (greedy.cpp), without a compiler the loops of this file.
`reference` says plainly what all compute.

A row's value, C being the rows chosen so far:

    "sum"    - sum_c cos(v, c)                               max-sum diversification (ToDRE, arXiv 2505.18757)
    "max"    s_v (1 - max_c cos(v, c))                       k-center weighted by a score (ZOO-Prune, arXiv 2509.24837)
    "cover"  s_v + sum_x max(0, cos(v, x) - cover_x)         facility location, cover_x = max(0, max_c cos(x, c))

Values that differ by rounding alone are ties, and the lowest row wins: which of two equal tokens is kept does not
depend on the device or on the order in which it sums.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokred.backends.kernels.native import library

__all__ = ["OBJECTIVES", "greedy_diverse", "reference", "tie_width"]

OBJECTIVES = ("sum", "max", "cover")
NOTHING = {"sum": 0.0, "max": -1.0, "cover": 0.0}  # what a row's similarity to no row at all is
PADDING, LIMIT = -1e30, 1e20  # the value of rows outside `among`; scores are within +-LIMIT
LAZY = 64  # gains that one round of `_covering` computes
WORK = 1 << 18  # products for which one more thread pays


@torch.library.custom_op("tokred::greedy_diverse", mutates_args=())
def greedy_diverse(
    features: Tensor,
    count: int,
    objective: str,
    score: Tensor | None = None,
    first: Tensor | None = None,
    among: Tensor | None = None,
) -> Tensor:
    """Choose `count` distinct rows of each sample, each the one of highest value: [B count] row numbers in that order.

    features  [B N D], compared by cosine in float32 or better; a row of zeros resembles nothing
    score     [B N] is s above: 1 for "max" and 0 for "cover" where it is None; "sum" takes none
    first     [B] the row that is chosen first, whatever its value; None is the one of highest value
    among     [B N] boolean: the others (padding) count for nothing, and are chosen when nothing else is left

    Raises ValueError for an unknown objective, a score with "sum", and more rows than there are.
    """
    _check(features, count, objective, score)
    unit, score, ceiling = prepared(features, objective, score, among)
    if features.is_cuda:
        from tokred.backends.kernels.greedy_triton import launch  # Triton comes with torch where there is CUDA

        return launch(similarities(unit, ceiling), score, ceiling, count, objective, first)
    if objective == "cover":
        return _covering(similarities(unit, ceiling), score, ceiling, count, first)
    # All products at once take as long as one row's products N/2 times or more: measured at N 576, 2880, D 1024, 4096.
    table = unit @ unit.mT if 2 * count > unit.shape[1] else None
    if table is None and (kernel := _kernel(unit)) is not None:
        return _launch(kernel, unit, score, ceiling, count, objective, first)
    starts = [None] * len(unit) if first is None else first.tolist()
    samples = zip(unit, [None] * len(unit) if table is None else table, score, ceiling, starts, strict=True)
    chosen = [_choosing(*sample, count, objective) for sample in samples]
    return torch.tensor(chosen, dtype=torch.int64, device=unit.device).view(len(unit), count)


@cache
def _functions() -> dict[torch.dtype, Any]:
    """The functions of greedy.cpp by the type that they compute in; empty where there is no compiler."""
    found, functions = library("greedy"), {}
    for dtype in () if found is None else (torch.float32, torch.float64):
        function = getattr(found, f"greedy_{str(dtype).removeprefix('torch.')}")
        address, size = ctypes.c_void_p, ctypes.c_int64
        function.argtypes = (address, address, address, size, size, size, ctypes.c_int32, size, ctypes.c_double)
        function.argtypes += (address, ctypes.c_int32)
        function.restype = None
        functions[dtype] = function
    return functions


def _kernel(unit: Tensor) -> Any:
    return _functions().get(unit.dtype) if unit.device.type == "cpu" else None


def _launch(
    kernel: Any, unit: Tensor, score: Tensor, ceiling: Tensor, count: int, objective: str, first: Tensor | None
) -> Tensor:
    unit, (batch, rows, width) = unit.contiguous(), unit.shape
    chosen = torch.empty(batch, count, dtype=torch.int64)
    starts = [-1] * batch if first is None else first.tolist()
    threads = min(torch.get_num_threads(), 1 + rows * width * count // WORK)
    for sample, start in enumerate(starts):
        inputs = (x[sample].data_ptr() for x in (unit, score, ceiling))
        sizes, tie = (rows, width, count), tie_width(unit.dtype)
        kernel(*inputs, *sizes, objective == "sum", start, tie, chosen[sample].data_ptr(), threads)
    return chosen


def _choosing(
    unit: Tensor, table: Tensor | None, score: Tensor, ceiling: Tensor, first: int | None, count: int, objective: str
) -> list[int]:
    """ "sum" and "max" for one sample [N D]; NumPy's calls on a few hundred numbers take a quarter of torch's time."""
    rows, weight, most = (x.cpu().numpy() for x in (unit, score, ceiling.clone()))
    products = None if table is None else table.cpu().numpy()
    width, near = tie_width(unit.dtype), np.full_like(weight, NOTHING[objective])
    chosen: list[int] = []
    for _ in range(count):
        value = np.minimum(-near if objective == "sum" else weight * (1 - near), most)
        best = value.max()
        row = int((value >= best - width * max(abs(best), 1.0)).argmax())
        row = row if first is None or chosen else first
        chosen.append(row)
        most[row] = -np.inf
        similar = rows @ rows[row] if products is None else products[row]
        near = near + similar if objective == "sum" else np.maximum(near, similar)
    return chosen


@greedy_diverse.register_fake
def _(features: Tensor, count: int, objective: str, score: Tensor | None = None, *rest: Any) -> Tensor:
    _check(features, count, objective, score)
    return features.new_empty((features.shape[0], count), dtype=torch.int64)


def prepared(
    features: Tensor, objective: str, score: Tensor | None, among: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of length one [B N D], finite scores [B N], and the highest value that each row may have [B N]."""
    wide = features if features.dtype == torch.float64 else features.float()
    unit = torch.nan_to_num(wide / wide.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny), 0.0)
    if score is None:
        score = unit.new_full(unit.shape[:2], 1.0 if objective == "max" else 0.0)
    score = torch.nan_to_num(score.to(unit.dtype), 0.0).clamp(-LIMIT, LIMIT).contiguous()
    ceiling = torch.full_like(score, torch.inf)
    return unit, score, ceiling if among is None else ceiling.masked_fill(~among, PADDING)


def similarities(unit: Tensor, ceiling: Tensor) -> Tensor:
    """[B N N] cosines; padding, the columns of which are zero, needs no cover."""
    return (unit @ unit.mT) * (ceiling > 0).unsqueeze(1)


def tie_width(dtype: torch.dtype) -> float:
    """Values are ties if they differ by less than this times the larger of 1 and the best: a few dozen roundings."""
    return 32 * torch.finfo(dtype).eps


def _enough(value: Tensor) -> Tensor:
    """[B N] which values are the highest of their sample, or as good as."""
    best = value.amax(-1, keepdim=True)
    return value >= best - tie_width(value.dtype) * best.abs().clamp(min=1)


def _first(found: Tensor) -> Tensor:
    """[B N] booleans -> [B] the first true one."""
    return found.to(torch.uint8).argmax(-1)


def _covering(table: Tensor, score: Tensor, ceiling: Tensor, count: int, first: Tensor | None) -> Tensor:
    """Facility location from all similarities [B N N], lazily (Minoux 1978): gains only shrink, old ones are bounds.

    A step computes anew the highest bounds, a few dozen at a time, until those as good as the best are exact.
    """
    batch, tokens = score.shape
    samples = torch.arange(batch, device=score.device)
    chosen = torch.empty(batch, count, dtype=torch.int64, device=score.device)
    bound = torch.minimum(table.clamp(min=0).sum(-1) + score, ceiling)  # [B N]
    cover = torch.zeros_like(score)
    exact = torch.ones_like(score, dtype=torch.bool)  # so far nothing is chosen
    for step in range(count):
        while not exact[found := _enough(bound)].all():
            rows = bound.masked_fill(exact, -torch.inf).topk(min(LAZY, tokens)).indices  # [B R]
            gain = (table[samples[:, None], rows] - cover.unsqueeze(1)).clamp_(min=0).sum(-1) + score.gather(1, rows)
            bound.scatter_(1, rows, torch.minimum(gain, ceiling.gather(1, rows)))
            exact.scatter_(1, rows, True)
        row = first if first is not None and step == 0 else _first(found)
        chosen[:, step] = row
        bound[samples, row] = ceiling[samples, row] = -torch.inf
        cover = torch.maximum(cover, table[samples, row])
        exact = ceiling <= 0
    return chosen


def _check(features: Tensor, count: Any, objective: str, score: Tensor | None) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"greedy_diverse: objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    if objective == "sum" and score is not None:
        raise ValueError('greedy_diverse: objective "sum" takes no score')
    tokens = features.shape[1]
    if isinstance(count, int) and isinstance(tokens, int) and not 0 <= count <= tokens:
        raise ValueError(f"greedy_diverse: {count} of {tokens} rows")


def reference(
    features: Tensor,
    count: int,
    objective: str,
    score: Tensor | None = None,
    first: Tensor | None = None,
    among: Tensor | None = None,
) -> Tensor:
    """What `greedy_diverse` computes, from the definitions: one sample, one step, one row at a time, in float64."""
    picks = []
    for sample, rows in enumerate(torch.nn.functional.normalize(features.double(), dim=-1)):
        cos = (rows.unsqueeze(0) * rows.unsqueeze(1)).sum(-1)  # [N N]
        allowed = [True] * len(rows) if among is None else among[sample].tolist()
        weight = [float(objective == "max")] * len(rows) if score is None else score[sample].tolist()
        chosen: list[int] = []
        while len(chosen) < count:
            near = cos[:, chosen]  # [N C]
            value = {}
            for v in set(range(len(rows))) - set(chosen):
                if not allowed[v]:
                    value[v] = PADDING
                elif objective == "sum":
                    value[v] = -float(near[v].sum())
                elif objective == "max":
                    value[v] = weight[v] * (1 - float(near[v].max() if chosen else NOTHING["max"]))
                else:
                    cover = near.amax(1).clamp(min=0) if chosen else torch.zeros(len(rows))
                    value[v] = weight[v] + float((cos[v] - cover)[allowed].clamp(min=0).sum())
            best = max(value.values())
            width = tie_width(features.dtype if features.dtype == torch.float64 else torch.float32) * max(abs(best), 1)
            lowest = min(v for v in value if value[v] >= best - width)
            chosen.append(int(first[sample]) if first is not None and not chosen else lowest)
        picks.append(chosen)
    return torch.tensor(picks, dtype=torch.int64).reshape(len(picks), count)
