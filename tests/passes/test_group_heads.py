"""Key heads that were copied for grouped attention are read once each; other copies stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.rewriting import assert_exact, normal, rewritten

B, H, N, D = 2, 4, 6, 8
G = 2


def repeat_kv(x: Tensor) -> Tensor:
    b, h, m, d = x.shape
    return x[:, :, None, :, :].expand(b, h, G, m, d).reshape(b, h * G, m, d)


GROUPED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "repeat_interleave": lambda q, k, v: F.scaled_dot_product_attention(
        q, k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    ),
    "expand": lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v)),
    "expand, causal": lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), is_causal=True),
    "expand, scaled": lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), scale=0.7),
    "eager": lambda q, k, v: ((q @ repeat_kv(k).mT * 0.3).softmax(-1) @ repeat_kv(v)).transpose(1, 2),
    "five dimensions": lambda q, k, v: (
        (q.unflatten(1, (-1, G)) @ k[:, :, None].mT).softmax(-1) @ v[:, :, None]
    ).flatten(1, 2),
}


@pytest.mark.parametrize("name", GROUPED)
def test_copied_heads_become_groups(name: str) -> None:
    q, k, v = normal(B, H, N, D), normal(B, H // G, N, D, seed=1), normal(B, H // G, N, D, seed=2)
    done = rewritten(GROUPED[name], q, k, v)
    (call,) = done.calls
    assert call.kwargs["enable_gqa"] is True
    assert [x.meta["val"].shape[1] for x in call.args[:3]] == [H, H // G, H // G]
    assert_exact(done)


UNGROUPED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "tiled": lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat(1, G, 1, 1), v.repeat(1, G, 1, 1)),
    "keys alone": lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k), torch.cat([v, v + 1], 1)),
    "keys tiled, values copied": lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat(1, G, 1, 1), repeat_kv(v)),
    "copied along the keys": lambda q, k, v: F.scaled_dot_product_attention(
        q[:, : H // G], k.repeat_interleave(G, 2), v.repeat_interleave(G, 2)
    ),
}


@pytest.mark.parametrize("name", UNGROUPED)
def test_other_copies_stay(name: str) -> None:
    q, k, v = normal(B, H, N, D), normal(B, H // G, N, D, seed=1), normal(B, H // G, N, D, seed=2)
    done = rewritten(UNGROUPED[name], q, k, v)
    assert done.after[0] is done.before[0]
    assert_exact(done)


def test_gradients_of_groups() -> None:
    args = [
        x.requires_grad_()
        for x in (normal(B, H, N, D), normal(B, H // G, N, D, seed=1), normal(B, H // G, N, D, seed=2))
    ]
    done = rewritten(GROUPED["expand"], *args, grad=True)
    assert done.calls[0].kwargs["enable_gqa"] is True
    tangent = normal(*done.expected.shape)
    gradients = [torch.autograd.grad(y, args, tangent) for y in (done.expected, done.result)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)
