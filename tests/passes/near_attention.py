"""Programs that look like attention and are none, or are attention that Inductor's templates misread.

Each comes with the reason code that the matcher gives, or None where it is attention and becomes SDPA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.rewriting import normal

S = 4  # samples, heads and tokens are equally many where a template could confuse them
D = 8


class Near(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Tensor, ...]
    code: str | None


def four(count: int = 3, *shape: int) -> tuple[Tensor, ...]:
    return tuple(normal(*(shape or (S, S, S, D)), seed=i, dtype=torch.float32) for i in range(count))


def scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(D)


def heads(*xs: Tensor) -> list[Tensor]:
    return [x.permute(0, 2, 1, 3) for x in xs]


MASK = normal(1, 1, S, S, dtype=torch.float32)
KEEP = torch.ones(S, S, dtype=torch.bool).tril()
CODES = torch.tensor([[1, 0, 2, 1], [1, 1, 0, 2], [1, 2, 2, 0], [1, 0, 0, 1]])
INF = math.inf


def exp_over_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.amax(-2, True)).exp()
    return (e / e.sum(-2, True)) @ v


def exp_over_rows_summed_over_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.amax(-1, True)).exp()
    return (e / e.sum(-2, True)) @ v


def masked_by_code(code: int, fill: float) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, codes: Tensor) -> Tensor:
        q, k, v = heads(q, k, v)
        hidden = (codes == code).view(S, 1, 1, S).expand(S, S, S, S)
        return torch.softmax(scores(q, k).masked_fill(hidden, fill), -1) @ v

    return function


def causal_by_full(fill: float) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        q, k, v = heads(q, k, v)
        s = torch.matmul(q, k.permute(0, 1, 3, 2)).div(torch.full([], 3.0))
        return torch.where(keep, s, torch.full((), fill)).softmax(dim=-1).matmul(v)

    return function


def slot_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(-2)
    return (weights / weights.sum(-1, True)) @ v


def stable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (s - s.amax(-2, True)).softmax(-1) @ v


def residual(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(-1)
    return weights @ v + weights.sum(-1, keepdim=True)


def raw_scores_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k)
    return s.softmax(-1) @ v, s


def talking_heads(q: Tensor, k: Tensor, v: Tensor, mix: Tensor) -> Tensor:
    return torch.einsum("bhnm,hg->bgnm", scores(q, k), mix).softmax(-1) @ v


def talking_weights(q: Tensor, k: Tensor, v: Tensor, mix: Tensor) -> Tensor:
    return torch.einsum("bhnm,hg->bgnm", scores(q, k).softmax(-1), mix) @ v


def permuted_sdpa(*order: int) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.permute(order), k.permute(order), v.permute(order))

    return function


def permuted_sdpa_with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


WIDE = (*four(2), normal(S, S, S, 2 * D, dtype=torch.float32))  # other value channels: SDPA takes the decomposed path

NEAR: dict[str, Near] = {
    # normalised over another dimension
    "over queries": Near(lambda q, k, v: scores(q, k).softmax(-2) @ v, four(), "softmax-dim"),
    "over queries, mul": Near(lambda q, k, v: (q @ k.mT * 0.3).softmax(-2) @ v, four(), "softmax-dim"),
    "over queries, masked": Near(lambda q, k, v, m: (scores(q, k) + m).softmax(-2) @ v, (*four(), MASK), "softmax-dim"),
    "over heads": Near(lambda q, k, v: scores(q, k).softmax(1) @ v, four(), "softmax-dim"),
    "over samples": Near(lambda q, k, v: scores(q, k).softmax(0) @ v, four(), "softmax-dim"),
    "bmm over queries": Near(
        lambda q, k, v: torch.bmm(torch.bmm(q, k.mT).softmax(1), v), four(3, S, S, D), "softmax-dim"
    ),
    "permuted, over queries": Near(
        lambda q, k, v: scores(*heads(q, k)).softmax(-2) @ heads(v)[0], four(), "softmax-dim"
    ),
    "half-baked, over queries": Near(
        lambda q, k, v: F.dropout(scores(q, k).softmax(-2), 0.1, False).matmul(v), four(), "softmax-dim"
    ),
    "jointly": Near(
        lambda q, k, v: scores(q, k).flatten(-2).softmax(-1).unflatten(-1, (S, S)) @ v, four(), "softmax-dim"
    ),
    "slots": Near(slot_attention, four(), "extra-use"),
    "exp over queries": Near(exp_over_columns, four(), None),
    "exp over keys, sum over queries": Near(exp_over_rows_summed_over_columns, four(), None),
    # summed over another dimension
    "weights transposed": Near(lambda q, k, v: scores(q, k).softmax(-1).mT @ v, four(), "softmax-dim"),
    "summed over queries": Near(
        lambda q, k, v: torch.einsum("bhnm,bhnd->bhmd", scores(q, k).softmax(-1), v), four(), "softmax-dim"
    ),
    "summed over heads": Near(
        lambda q, k, v: torch.einsum("bhnm,bhmd->bnd", scores(q, k).softmax(-1), v), four(), "softmax-dim"
    ),
    "values by query": Near(
        lambda q, k, v: torch.einsum("bhnm,bhnmd->bhnd", scores(q, k).softmax(-1), v),
        (*four(2), *four(1, S, S, S, S, D)),
        "contraction",
    ),
    # used elsewhere
    "weights reused": Near(residual, four(), "extra-use"),
    "scores reused": Near(raw_scores_too, four(), "extra-use"),
    "minus the largest of each key": Near(stable, four(), "extra-use"),
    # other maths between
    "soft cap": Near(lambda q, k, v: (5 * torch.tanh(scores(q, k) / 5)).softmax(-1) @ v, four(), "op"),
    "clamped": Near(lambda q, k, v: scores(q, k).clamp(-0.1, 0.1).softmax(-1) @ v, four(), "op"),
    "talking heads": Near(talking_heads, (*four(), *four(1, S, S)), "contraction"),
    "talking weights": Near(talking_weights, (*four(), *four(1, S, S)), "softmax-dim"),
    "squared weights": Near(lambda q, k, v: scores(q, k).softmax(-1).square() @ v, four(), "no-values"),
    "masked weights": Near(lambda q, k, v, m: (scores(q, k).softmax(-1) * m) @ v, (*four(), MASK), "no-values"),
    "softmax twice": Near(lambda q, k, v: scores(q, k).softmax(-1).softmax(-1) @ v, four(), "no-values"),
    "log-softmax": Near(lambda q, k, v: scores(q, k).log_softmax(-1) @ v, four(), None),
    "sigmoid": Near(lambda q, k, v: scores(q, k).sigmoid() @ v, four(), None),
    "linear attention": Near(lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v), four(), "no-scores"),
    # scales
    "scale from data": Near(
        lambda q, k, v, s: (q @ k.mT / s).softmax(-1) @ v, (*four(), torch.tensor(0.3)), "data-scale"
    ),
    "scale for each head": Near(
        lambda q, k, v, s: (q @ k.mT * s.exp()).softmax(-1) @ v, (*four(), *four(1, S, 1, 1)), "data-scale"
    ),
    "scores times a mask": Near(lambda q, k, v, m: (scores(q, k) * m).softmax(-1) @ v, (*four(), MASK), "data-scale"),
    "negative scale": Near(lambda q, k, v: (q @ k.mT * -0.3).softmax(-1) @ v, four(), "scale"),
    "softmin": Near(lambda q, k, v: (-scores(q, k)).softmax(-1) @ v, four(), "scale"),
    # masks
    "filled with 0": Near(masked_by_code(0, 0.0), (*four(), CODES), "fill"),
    "filled with -5": Near(masked_by_code(0, -5.0), (*four(), CODES), "fill"),
    "causal, filled with 0": Near(causal_by_full(0.0), (*four(), KEEP), "fill"),
    "filled with data": Near(
        lambda q, k, v, m: torch.where(KEEP, scores(q, k), m).softmax(-1) @ v, (*four(), MASK), "fill"
    ),
    "two fills": Near(
        lambda q, k, v: scores(q, k).masked_fill(~KEEP, -1e9).masked_fill(KEEP.mT, -2e9).softmax(-1) @ v, four(), "fill"
    ),
    "mask larger than the scores": Near(
        lambda q, k, v, m: (scores(q, k) + m).softmax(-1) @ v, (*four(3, 1, S, S, D), MASK.expand(3, 1, S, S)), "layout"
    ),
    "boolean bias": Near(lambda q, k, v, m: (scores(q, k) + m).softmax(-1) @ v, (*four(), KEEP), None),
    "code 0 hidden": Near(masked_by_code(0, -INF), (*four(), CODES), None),
    "code 2 hidden": Near(masked_by_code(2, -INF), (*four(), CODES), None),
    "causal, filled with -1e9": Near(causal_by_full(-1e9), (*four(), KEEP), None),
    # precision
    "rounded scores": Near(lambda q, k, v: scores(q, k).bfloat16().softmax(-1).float() @ v, four(), "dtype"),
    # permutations that the templates take for another one
    "k stored [B M H D]": Near(lambda q, k, v: (q @ k.permute(0, 2, 3, 1) * 0.3).softmax(-1) @ v, four(), None),
    "k stored [H M B D]": Near(lambda q, k, v: (q @ k.permute(2, 0, 3, 1) / 3.0).softmax(-1) @ v, four(), None),
    "heads first": Near(
        lambda q, k, v: scores(*(x.permute(1, 0, 2, 3) for x in (q, k))).softmax(-1) @ v.permute(1, 0, 2, 3),
        four(),
        None,
    ),
    "tokens first": Near(
        lambda q, k, v: scores(*(x.permute(1, 2, 0, 3) for x in (q, k))).softmax(-1) @ v.permute(1, 2, 0, 3),
        four(),
        None,
    ),
    "SDPA, tokens first": Near(permuted_sdpa(1, 2, 0, 3), WIDE, None),
    "SDPA, heads first": Near(permuted_sdpa(1, 0, 2, 3), WIDE, None),
    "SDPA, tokens first, masked": Near(permuted_sdpa_with_mask, (*WIDE, MASK), None),
}
