"""Every spelling of attention becomes one SDPA with the same numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokred
from tests.passes.rewriting import assert_exact, normal, rewritten

B, H, N, M, D = 2, 4, 6, 7, 8
INF = math.inf
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()


def qkv(*lead: int, rows: int = N, keys: int = M) -> tuple[Tensor, Tensor, Tensor]:
    lead = lead or (B, H)
    return normal(*lead, rows, D, seed=1), normal(*lead, keys, D, seed=2), normal(*lead, keys, D, seed=3)


def swin(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Windows: a bias for each head, and a mask for each window that several samples share."""
    scores = (q * D**-0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
    scores = scores.view(-1, mask.shape[0], H, N, N) + mask.unsqueeze(1).unsqueeze(0)
    return (scores.view(-1, H, N, N).softmax(-1) @ v).transpose(1, 2).reshape(-1, N, H * D)


def relative(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """SAM: relative positions along the two sides of a grid of 2 x 3 keys."""
    r = q.view(-1, 2, 3, D)
    scores = (q * 0.3) @ k.transpose(-2, -1)
    height = torch.einsum("bhwc,hkc->bhwk", r, rows)
    width = torch.einsum("bhwc,wkc->bhwk", r, columns)
    scores = scores.view(-1, 2, 3, 2, 3) + height[:, :, :, :, None] + width[:, :, :, None, :]
    return scores.view(-1, 6, 6).softmax(-1) @ v


def mbart(x: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    """Heads folded into the batch, a mask added in four dimensions, scaling before the view."""
    heads = lambda y: y.view(B, N, H, D).transpose(1, 2).contiguous()  # noqa: E731
    q = heads((x @ w) * D**-0.5).view(B * H, -1, D)
    k, v = heads(x).view(B * H, -1, D), heads(x + 1).view(B * H, -1, D)
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, N, N) + mask
    weights = F.dropout(F.softmax(scores.view(B * H, N, N), dim=-1), p=0.1, training=False)
    return torch.bmm(weights, v).view(B, H, N, D).transpose(1, 2).reshape(B, N, H * D)


def megatron(x: Tensor) -> Tensor:
    """[T B C], heads folded into the batch, baddbmm."""
    q, k, v = (y.view(N, B * H, D).transpose(0, 1) for y in (x, x + 1, x - 1))
    empty = x.new_empty(B * H, N, N)
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0.0, alpha=0.4)
    return torch.bmm(scores.softmax(-1), v).transpose(0, 1).reshape(N, B, H * D)


def packed(x: Tensor) -> Tensor:
    q, k, v = x.reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    attn = (q @ k.transpose(-2, -1)) * D**-0.5
    return (F.dropout(attn.softmax(dim=-1), 0.1, False) @ v).transpose(1, 2).reshape(B, N, H * D)


def constant_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = torch.sqrt(torch.tensor(q.size(-1) * 3, dtype=q.dtype))
    return torch.softmax(q @ (k.transpose(-1, -2) / scale), -1) @ v


def scaled_everywhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((((q / 2.0) @ (k * 0.5).mT) * 1.5) / 3.0).softmax(-1) @ v


hidden = normal(B, 1, N, M, seed=9) > 0.3
few = normal(B, 1, 1, M, seed=8) > -0.5
additive = torch.zeros(B, 1, N, M, dtype=torch.float64).masked_fill(hidden, torch.finfo(torch.float64).min)
all_hidden = hidden.clone()
all_hidden[0, 0, 2] = True

SPELLINGS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "matmul": (lambda q, k, v: torch.matmul(q, k.transpose(-2, -1)).softmax(-1).matmul(v), qkv()),
    "mul after": (lambda q, k, v: (q @ k.mT * 0.2).softmax(-1) @ v, qkv()),
    "div after": (lambda q, k, v: (q @ k.mT / math.sqrt(D)).softmax(dim=3) @ v, qkv()),
    "mul on q": (lambda q, k, v: (q * 0.2 @ k.mT).softmax(-1) @ v, qkv()),
    "div on k": (lambda q, k, v: (q @ (k / 5).mT).softmax(-1) @ v, qkv()),
    "everywhere": (scaled_everywhere, qkv()),
    "number times scores": (lambda q, k, v: (0.2 * (q @ k.mT)).softmax(-1) @ v, qkv()),
    "0-d constant": (constant_scale, qkv()),
    "full": (lambda q, k, v: (q @ k.mT / torch.full([], 3.0, dtype=q.dtype)).softmax(-1) @ v, qkv()),
    "two minuses": (lambda q, k, v: ((q * -1.0) @ (k * -0.3).mT).softmax(-1) @ v, qkv()),
    "permute": (lambda q, k, v: (q @ k.permute(0, 1, 3, 2)).softmax(-1) @ v, qkv()),
    "k stored [B M H D]": (
        lambda q, k, v: (q @ k.permute(0, 2, 3, 1)).softmax(-1) @ v,
        (qkv()[0], normal(B, M, H, D), qkv()[2]),
    ),
    "k stored [B H D M]": (lambda q, k, v: (q @ k).softmax(-1) @ v, (qkv()[0], normal(B, H, D, M), qkv()[2])),
    "einsum": (
        lambda q, k, v: torch.einsum("bhnm,bhmd->bhnd", torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1), v),
        qkv(),
    ),
    "einsum [B N H D]": (
        lambda q, k, v: torch.einsum("bhqk,bkhd->bqhd", torch.einsum("bqhd,bkhd->bhqk", q * 0.3, k).softmax(-1), v),
        (normal(B, N, H, D), normal(B, M, H, D, seed=1), normal(B, M, H, D, seed=2)),
    ),
    "einsum, one key head": (
        lambda q, k, v: torch.einsum("bhqk,bkd->bqhd", torch.einsum("bqhd,bkd->bhqk", q, k).softmax(-1), v),
        (normal(B, N, H, D), normal(B, M, D, seed=1), normal(B, M, D, seed=2)),
    ),
    "keys times queries": (lambda q, k, v: (k @ q.mT * 0.3).softmax(-2).mT @ v, qkv()),
    "values transposed": (lambda q, k, v: (v.mT @ (q @ k.mT).softmax(-1).mT).mT, qkv()),
    "bmm": (lambda q, k, v: torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(2), v), qkv(B)),
    "two dimensions": (lambda q, k, v: (q @ k.T).softmax(-1) @ v, (normal(N, D), normal(M, D), normal(M, D, seed=5))),
    "five dimensions": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, qkv(2, 3, 2)),
    "broadcast heads": (
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
        (qkv()[0], normal(B, 1, M, D), normal(B, 1, M, D, seed=4)),
    ),
    "broadcast batch": (
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
        (qkv()[0], normal(H, M, D), normal(H, M, D, seed=4)),
    ),
    "wider values": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (*qkv()[:2], normal(B, H, M, 12))),
    "one query": (lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v, qkv(rows=1)),
    "additive mask": (lambda q, k, v, m: (q @ k.mT * 0.3 + m).softmax(-1) @ v, (*qkv(), additive)),
    "mask first": (lambda q, k, v, m: (m + q @ k.mT).softmax(-1) @ v, (*qkv(), additive)),
    "minus a mask": (lambda q, k, v, m: (q @ k.mT - m).softmax(-1) @ v, (*qkv(), normal(H, N, M))),
    "several masks": (
        lambda q, k, v, m, b: ((q @ k.mT + b) * 0.3 + m + b[0]).softmax(-1) @ v,
        (*qkv(), additive, normal(H, N, M)),
    ),
    "alpha": (lambda q, k, v, m: torch.add(q @ k.mT, m, alpha=2).softmax(-1) @ v, (*qkv(), normal(M))),
    "integer bias": (lambda q, k, v, m: (q @ k.mT + m).softmax(-1) @ v, (*qkv(), torch.arange(M))),
    "boolean bias": (lambda q, k, v, m: (q @ k.mT + m).softmax(-1) @ v, (*qkv(), hidden)),
    "mask over queries alone": (lambda q, k, v, m: (q @ k.mT + m).softmax(-1) @ v, (*qkv(), normal(N, 1))),
    "shift": (lambda q, k, v: (q @ k.mT - 3.0).softmax(-1) @ v, qkv()),
    "masked_fill -inf": (lambda q, k, v, m: (q @ k.mT).masked_fill(m, -INF).softmax(-1) @ v, (*qkv(), few)),
    "masked_fill -inf, rows of nothing": (
        lambda q, k, v, m: (q @ k.mT).masked_fill(m, -INF).softmax(-1) @ v,
        (*qkv(), all_hidden),
    ),
    "masked_fill -1e9, rows of nothing": (
        lambda q, k, v, m: (q @ k.mT * 0.3).masked_fill(m, -1e9).softmax(-1) @ v,
        (*qkv(), all_hidden),
    ),
    "masked_fill by a tensor": (
        lambda q, k, v, m: (q @ k.mT).masked_fill(m, torch.full([], -INF, dtype=q.dtype)).softmax(-1) @ v,
        (*qkv(), hidden),
    ),
    "fill, then scale": (
        lambda q, k, v, m: (q @ k.mT).masked_fill(m, -1e30).mul(0.3).softmax(-1) @ v,
        (*qkv(), hidden),
    ),
    "where -inf": (lambda q, k, v, m: torch.where(m, q @ k.mT, -INF).softmax(-1) @ v, (*qkv(), ~hidden)),
    "where, other way round": (lambda q, k, v, m: torch.where(m, -INF, q @ k.mT).softmax(-1) @ v, (*qkv(), hidden)),
    "where by a tensor": (
        lambda q, k, v, m: torch.where(m, q @ k.mT, torch.full_like(q[:, :1, :1, :1], -INF)).softmax(-1) @ v,
        (*qkv(), ~hidden),
    ),
    "literal causal mask": (
        lambda q, k, v: (
            torch.where(torch.ones(N, N).tril() == 1, q @ k.mT * 0.3, torch.finfo(q.dtype).min).softmax(-1) @ v
        ),
        qkv(keys=N),
    ),
    "fill and infinite bias": (
        lambda q, k, v, m, b: (q @ k.mT + b).masked_fill(m, -INF).softmax(-1) @ v,
        (*qkv(), hidden, additive),
    ),
    "two fills": (
        lambda q, k, v, m, f: (q @ k.mT).masked_fill(m, -1e9).masked_fill(f, -1e9).softmax(-1) @ v,
        (*qkv(), hidden, few),
    ),
    "rows hidden by an additive mask": (
        lambda q, k, v, m: (q @ k.mT + m).softmax(-1) @ v,
        (*qkv(), torch.zeros(B, 1, N, M).masked_fill(all_hidden, -INF)),
    ),
    "safe softmax": (
        lambda q, k, v, m: torch.ops.aten._safe_softmax((q @ k.mT).masked_fill(m, -INF), -1) @ v,
        (*qkv(), all_hidden),
    ),
    "windows": (swin, (*(normal(6, H, N, D, seed=i) for i in range(3)), normal(H, N, N), normal(3, N, N))),
    "relative positions": (relative, (*(normal(B, 6, D, seed=i) for i in range(3)), normal(2, 2, D), normal(3, 3, D))),
    "folded heads": (mbart, (normal(B, N, H * D), normal(H * D, H * D), normal(B, 1, 1, N))),
    "batch second": (megatron, (normal(N, B, H * D),)),
    "packed": (packed, (normal(B, N, 3 * H * D),)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_becomes_one_sdpa(name: str) -> None:
    function, args = SPELLINGS[name]
    done = rewritten(function, *args)
    assert (len(done.calls), done.softmaxes, len(done.lines)) == (1, 0, 1)
    assert_exact(done)


def test_through_the_backend() -> None:
    function, args = SPELLINGS["additive mask"]
    tokred.reset()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="tokred", options={"lower": "eager"})
    torch.testing.assert_close(compiled(*args), function(*args), rtol=1e-10, atol=1e-10)
    (report,) = tokred.reports().graphs
    (entry,) = [p for p in report.passes if p.name == "canonical_attention"]
    assert (entry.changes, entry.exact) == (1, True)
    assert "softmax(q k^T) v" in entry.lines[0]
    assert "test_canonical_attention.py" in entry.lines[0]


def test_new_nodes_know_their_values_and_where_they_come_from() -> None:
    function, args = SPELLINGS["windows"]
    done = rewritten(function, *args)
    for node in done.after[0].graph.nodes:
        if node.op == "call_function":
            assert isinstance(node.meta["val"], torch.Tensor), node
            assert "test_canonical_attention.py" in node.meta["stack_trace"], node


def test_no_softmax_is_no_change() -> None:
    done = rewritten(lambda x: F.gelu(x @ x.mT) @ x, normal(B, N, D))
    assert done.after[0] is done.before[0]
    assert done.lines == []


# -- operands that need no copy ----------------------------------------------------------------------------------------


def test_a_scaling_of_q_leaves_the_graph() -> None:
    done = rewritten(lambda q, k, v: ((q * 0.2) @ k.mT).softmax(-1) @ v, *qkv())
    (call,) = done.calls
    assert [node.op for node in call.args[:3]] == ["placeholder"] * 3
    assert call.kwargs["scale"] == pytest.approx(0.2)


def test_a_mask_of_windows_is_not_copied_for_each_sample() -> None:
    function, args = SPELLINGS["windows"]
    (call,) = rewritten(function, *args).calls
    query, mask = call.args[0].meta["val"], call.args[3].meta["val"]
    assert tuple(query.shape) == (2, 3 * H, N, D)  # samples, windows and heads
    assert tuple(mask.shape) == (1, 3 * H, N, N)


def test_a_known_mask_needs_no_guard() -> None:
    """No row of a causal mask is empty, so nothing looks for such rows."""
    function, args = SPELLINGS["literal causal mask"]
    guarded, guarded_args = SPELLINGS["masked_fill -inf"]
    any_dim = torch.ops.aten.any.dim
    assert not any(n.target is any_dim for n in rewritten(function, *args).after[0].graph.nodes)
    assert any(n.target is any_dim for n in rewritten(guarded, *guarded_args).after[0].graph.nodes)


def test_the_result_can_be_viewed_as_before() -> None:
    def before(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = (q @ k.mT).softmax(-1) @ v
        return out, (out * 2).view(B * H, N, D)

    done = rewritten(before, *qkv())
    assert len(done.calls) == 1
    assert_exact(done)
    assert [x.stride() for x in done.result] == [x.stride() for x in done.expected]


# -- training, dtypes, symbolic sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mul after", "einsum [B N H D]", "several masks", "masked_fill -1e9, rows of nothing", "windows"]
)
def test_gradients_are_the_same(name: str) -> None:
    function, args = SPELLINGS[name]
    args = tuple(x.clone().requires_grad_(x.is_floating_point() and i < 3) for i, x in enumerate(args))
    done = rewritten(function, *args, grad=True)
    assert len(done.calls) == 1
    tangent = normal(*done.expected.shape)
    gradients = [torch.autograd.grad(y, args[:3], tangent) for y in (done.expected, done.result)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


def softmax_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT * 0.3, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def scores_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q.float() @ k.float().mT).softmax(-1).to(v.dtype) @ v


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [softmax_in_float32, scores_in_float32])
def test_half_precision_with_float32_inside(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    done = rewritten(function, *(x.to(dtype) for x in qkv()))
    (call,) = done.calls
    assert call.args[0].meta["val"].dtype is dtype
    exact = function(*(x.to(dtype).double() for x in qkv()))
    error = lambda x: (x.double() - exact).abs().max()  # noqa: E731
    assert error(done.result) <= error(done.expected) + torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["packed", "folded heads", "additive mask", "bmm"])
def test_symbolic_batch(name: str) -> None:
    def folded(x: Tensor, mask: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k = (y.view(b, n, H, D).transpose(1, 2).reshape(b * H, n, D) for y in (x * 0.3, x))
        scores = torch.bmm(q, k.mT).view(b, H, n, n) + mask
        out = torch.bmm(scores.view(b * H, n, n).softmax(-1), k).view(b, H, n, D)
        return out.transpose(1, 2).reshape(b, n, c)

    def packed_(x: Tensor) -> Tensor:
        q, k, v = x.reshape(x.shape[0], x.shape[1], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        return ((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2).flatten(2)

    if name == "folded heads":
        function, args = folded, (normal(B, N, H * D), normal(B, 1, 1, N))
    else:
        function, args = (packed_, SPELLINGS["packed"][1]) if name == "packed" else SPELLINGS[name]
    for x in args:
        if x.shape[0] == B:
            torch._dynamo.mark_dynamic(x, 0)
    done = rewritten(function, *args)
    assert isinstance(done.calls[0].meta["val"].shape[0], torch.SymInt)
    assert_exact(done)


def test_gradients_do_not_cross_no_grad(caplog: pytest.LogCaptureFixture) -> None:
    """The weights have no gradient here; SDPA would give them one."""

    def before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            weights = (q @ k.mT).softmax(-1)
        return weights @ v

    args = [x.requires_grad_() for x in qkv()]
    with caplog.at_level(logging.INFO, "tokred"):
        done = rewritten(before, *args, grad=True)
    assert done.calls == []
    assert "[region]" in caplog.text
