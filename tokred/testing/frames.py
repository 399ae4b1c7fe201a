"""Checks of a method that carries image tokens from one call to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokred.compiler.memory import Memory
from tokred.registry.frames import FrameFusion, Frames
from tokred.testing.models import WIDTH, TinyPrompt, compiled

__all__ = ["check_frames"]

Inputs = tuple[Any, ...]
EXACT = 1e-10  # float64: rounding only


def check_frames(method: FrameFusion, nothing: FrameFusion, make: Callable[[int], Inputs]) -> None:
    """What `check_method` promises of a FrameFusion, in TinyPrompt, whose inputs `make` gives for a number of samples.

    `nothing` is the same method that takes all tokens anew in each call.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        _check_fuse(method, dtype)
    model = TinyPrompt().eval()
    ids, pixels = make(3)
    frames: list[Inputs] = [(ids, pixels), (ids, pixels + 1e-3), (ids, pixels - 1e-3)]
    plain = [model(*frame) for frame in frames]
    for got, wanted in zip(_play(nothing, model, frames), plain, strict=True):
        assert torch.equal(got, wanted), f"{nothing} takes all tokens anew, but the output is not bitwise the model's"
    first, *others = _play(method, model, frames)
    assert torch.equal(first, plain[0]), f"{method}: the first call, which has none before it, is not bitwise the model"
    changed = any(not torch.equal(got, wanted) for got, wanted in zip(others, plain[1:], strict=True))
    assert changed, f"{method} never uses what the last call had, although next to nothing moved"
    for one, two in zip(others, _play(method, model, frames)[1:], strict=True):
        assert torch.equal(one, two), f"{method}: two runs of the same frames differ"
    gradients = torch.autograd.grad(others[-1].square().mean(), list(model.parameters()), allow_unused=True)
    finite = all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    assert finite, f"{method}: gradients are not finite"
    _check_dynamic(method, model, make)


def _play(method: FrameFusion, model: nn.Module, frames: list[Inputs]) -> list[Tensor]:
    """The outputs of one newly compiled model for one frame after another."""
    function, run = compiled(model, method)
    outputs = [function(*frame) for frame in frames]
    entries = [entry for graph in run.graphs for entry in graph.report.passes if entry.name == "fuse_frames"]
    refusals = "; ".join(refusal.reason for entry in entries for refusal in entry.refusals)
    carried = any(isinstance(extra, Memory) for graph in run.graphs for extra in graph.extras)
    assert carried, f"{method} acts in no model: {refusals or 'no image tokens'}"
    return outputs


def _check_dynamic(method: FrameFusion, model: nn.Module, make: Callable[[int], Inputs]) -> None:
    """One graph serves batches of several sizes, and begins anew with each."""
    function, run = compiled(model, method)
    for batch in (3, 5, 4):
        inputs = make(batch)
        for tensor in inputs:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        gap = (function(*inputs) - model(*inputs)).abs().max()
        assert gap < 1e-4, f"{method}: a call with {batch} images after one with others does not begin anew"
    assert len(run.graphs) == 1, f"{method}: {len(run.graphs)} graphs for three batch sizes, not one"


def _check_fuse(method: FrameFusion, dtype: torch.dtype) -> None:
    """The tensor code alone: types, inputs left alone, each image by itself."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    pixels, features = normal(3, 3, 8, 8), normal(3, 16, WIDTH)
    relevance = None if method.looks(12) is None else normal(3, 16).float().softmax(-1)
    before = Frames(pixels + 0.2 * normal(3, 3, 8, 8), normal(3, 16, WIDTH), relevance, 2)
    step = torch.tensor(1)
    own = [pixels, features, before.pixels, before.features, step, *([] if relevance is None else [relevance])]
    copies = [x.clone() for x in own]
    fused = method.fuse(pixels, features, before, step)
    where = f"{method}.fuse in {dtype}"
    assert fused.shape == features.shape and fused.dtype == dtype, f"{where}: {list(fused.shape)} {fused.dtype}"
    untouched = all(torch.equal(x, copy) for x, copy in zip(own, copies, strict=True))
    assert untouched, f"{where} changed one of its inputs in place"
    row = slice(1, 2)
    seen = None if relevance is None else relevance[row]
    alone = Frames(before.pixels[row], before.features[row], seen, before.patch)
    gap = (method.fuse(pixels[row], features[row], alone, step) - fused[row]).abs().max()
    assert gap <= EXACT, f"{where}: an image's tokens depend on the other images"
