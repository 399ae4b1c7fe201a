"""Checks of a method that computes attention in another way, against dense attention and against itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokred.registry.attention import AttentionRewrite

__all__ = ["check_attention", "long_enough"]

HEADS, GROUPS, CHANNELS = 4, 2, 8
EXACT = 1e-10  # float64: rounding only


def long_enough(method: AttentionRewrite) -> int:
    """Tokens of which the method leaves some out."""
    assert method.shortest is not None, f"{method} leaves nothing out of any number of tokens"
    return 2 * method.shortest


def check_attention(method: AttentionRewrite, nothing: AttentionRewrite) -> None:
    """What `check_method` promises of the attention itself. `nothing` is the same method that leaves nothing out."""
    tokens = long_enough(method)
    assert nothing.shortest is None, f"{nothing} should leave nothing out, but says that it does"
    effort = method.effort(tokens, CHANNELS)
    assert 0 < effort.attended <= tokens**2, f"{method}: effort() says {effort.attended} pairs of {tokens} tokens"
    for dtype in (torch.float32, torch.bfloat16):
        check_result(method, *operands(1, tokens, dtype))
    query, key, value = operands(2, tokens, torch.float64)
    attended = check_result(method, query, key, value)
    dense = _dense(query, key, value)
    gap = (attended - dense).abs().max()
    assert gap > EXACT, f"{method} leaves nothing out of {tokens} tokens"
    _close(nothing.attend(query, key, value, None, None), dense, f"{nothing} is not the dense attention")
    few = method.shortest - 1 if method.shortest is not None else 0
    q, k, v = (x[:, :, :few] for x in (query, key, value))
    _close(method.attend(q, k, v, None, None), _dense(q, k, v), f"{method} on {few} tokens is not the dense attention")
    _check_samples(method, query, key, value, attended)


def check_result(method: AttentionRewrite, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Shape, type, repeatability, inputs left alone, finite gradients. Returns the result."""
    where = f"{method} on {query.shape[2]} tokens in {query.dtype}"
    inputs = q, k, v = tuple(x.clone().requires_grad_() for x in (query, key, value))
    attended = method.attend(q, k, v, None, None)
    assert attended.shape == (*query.shape[:3], value.shape[-1]), f"{where}: attend() gives {list(attended.shape)}"
    assert attended.dtype == query.dtype, f"{where}: attend() gives {attended.dtype}"
    assert attended.isfinite().all(), f"{where}: the result is not finite"
    again = method.attend(query, key, value, None, None)
    assert torch.equal(attended, again), f"{where}: two runs on the same input differ"
    for before, after in zip((query, key, value), inputs, strict=True):
        assert torch.equal(before, after), f"{where}: attend() changed one of its inputs in place"
    for gradient in torch.autograd.grad(attended.float().square().sum(), inputs):
        assert gradient.isfinite().all(), f"{where}: gradients are not finite"
    return attended.detach()


def _check_samples(method: AttentionRewrite, query: Tensor, key: Tensor, value: Tensor, attended: Tensor) -> None:
    """A sample alone, and behind padding, is what it is in its batch."""
    tokens, padding = query.shape[2], 5
    alone = method.attend(query[1:], key[1:], value[1:], None, None)
    _close(alone, attended[1:], f"{method}: a sample's attention depends on the other samples")
    places = torch.arange(tokens)
    causal = (places <= places.unsqueeze(1)).expand(2, 1, -1, -1)  # [B 1 N N]
    _close(method.attend(query, key, value, causal, None), attended, f"{method}: a causal mask is not like none")
    padded = causal & (places >= torch.tensor([0, padding])[:, None, None, None])
    behind = method.attend(query, key, value, padded, None)[1:, :, padding:]
    q, k, v = (x[1:, :, padding:] for x in (query, key, value))
    _close(behind, method.attend(q, k, v, None, None), f"{method}: padding changes a sample's attention")


def operands(batch: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries [B H N D], keys and values [B G N D]: random, and their scores are peaked."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, tokens, CHANNELS) for heads in (HEADS, GROUPS, GROUPS)]
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _close(a: Tensor, b: Tensor, message: str) -> None:
    gap = (a - b).abs().max().item()
    assert gap <= EXACT, f"{message}: they differ by {gap:.1e}"
