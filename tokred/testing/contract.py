"""The whole contract of a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokred.registry.attention import AttentionRewrite
from tokred.registry.frames import FrameFusion
from tokred.registry.method import Method, Reduction
from tokred.registry.neurons import Sparsity
from tokred.registry.recipe import parse_recipe
from tokred.registry.sparsify.adaptive_width import AdaptiveWidth
from tokred.registry.sparsify.lora_prune import LoraPrune
from tokred.testing.attention import check_attention, long_enough
from tokred.testing.frames import check_frames
from tokred.testing.learners import check_learners
from tokred.testing.lora import check_lora
from tokred.testing.maps import check_plans
from tokred.testing.models import (
    Run,
    TinyDecoder,
    TinyPrompt,
    TinyText,
    TinyViT,
    Traced,
    check_dynamic,
    check_model,
    check_type,
)
from tokred.testing.neurons import check_sparsity
from tokred.testing.sites import places

__all__ = ["check_method", "idle"]

AnyMethod = TypeVar("AnyMethod", bound=Method)


def check_method(
    method: Method | type[Method] | str, model: nn.Module | None = None, inputs: Sequence[Any] | None = None
) -> None:
    """Raise AssertionError, with a sentence that says what is broken, unless the method keeps the contract:

    - with `r=0`, `ratio=0` or `keep=1` nothing is removed, and the compiled model is bitwise the model
    - `removed(place)` is the number of tokens that the map of `plan(site)` removes
    - protected rows stay where they are, as they are; `causal_safe` methods keep the others in order, unmixed;
      those that declare `merges = "visual"` keep everything but image tokens in order, unmixed
    - the same inputs give the same plan; a sample's plan does not depend on its batch
    - maps agree with dense matrices in float64: reduce, restore, pull, window; means are means, restored ones too
    - float32, bfloat16, float64; one sample, several, a dynamic number; padding; earlier merges; finite gradients

    An `AttentionRewrite` instead:

    - with `coverage=0`, and on fewer tokens than `shortest`, it is the dense attention
    - the same inputs give the same result; a sample's result depends neither on its batch nor on its padding; a causal
      mask says the same as none
    - float32, bfloat16, float64; shared key heads; one sample, several, a dynamic number; finite gradients

    A `FrameFusion` instead:

    - with `keyframe=1`, and in the first call, the compiled model is bitwise the model; later calls use earlier tokens
    - the same frames give the same results; an image's tokens do not depend on the others
    - float32, bfloat16, float64; a dynamic number of samples, of which another one begins anew; finite gradients

    A `Skip` instead: what leaves nothing out is bitwise the model; otherwise shapes, types and gradients as above.

    A `Sparsity` instead:

    - with `sparsity=0` nothing is left out, and the compiled model is bitwise the model; so it is on prompts while the
      method means the decoding
    - `masked` sets numbers to zero and leaves all others as they are; the same inputs give the same mask; a sample's
      does not depend on its batch, except where samples choose together (`Chosen`)
    - it acts in a small decoder with gated MLPs; float32, bfloat16, float64; finite gradients

    A `LoraPrune` instead:

    - the compiled model computes what the model does, also with other weights; where gradients are wanted it is refused
    - float64, float32, bfloat16; a dynamic number of samples

    An `AdaptiveWidth` instead, with learners for 32 channels in some of the layers 0 to 2:

    - with `layers=[]` the compiled model is bitwise the model; else it acts, and what a sample gets does not depend on
      the others; gradients are finite, and of the same results
    - float64, float32, bfloat16; a dynamic number of samples

    method         a method object, its class (then with default options), or a recipe string of one method
    model, inputs  a model (in eval mode) and its positional inputs, to be checked instead of a small ViT, a small text
                   encoder and a small decoder with image tokens, for methods that need something these lack

    The small models are traced once a process: many methods are checked in little more time than one.
    """
    subject = _one(method)
    if isinstance(subject, LoraPrune):
        check_lora(subject)
        return
    if isinstance(subject, AdaptiveWidth):
        check_learners(subject)
        return
    nothing = idle(subject)
    if isinstance(subject, Sparsity):
        assert isinstance(nothing, Sparsity)
        check_sparsity(subject, nothing)
        return
    if isinstance(subject, AttentionRewrite):
        assert isinstance(nothing, AttentionRewrite)
        check_attention(subject, nothing)
    elif isinstance(subject, FrameFusion):
        assert isinstance(nothing, FrameFusion) and model is None, "frames are checked in a model of this package"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            check_frames(subject, nothing, prompt)
        return
    elif isinstance(subject, Reduction):
        assert isinstance(nothing, Reduction)
        for place in places(nothing):
            removed = nothing.removed(place)
            assert removed == 0, f"{nothing} removes {removed} of {place.tokens} tokens, not 0"
        acted = check_plans(subject)
        assert acted or model is not None, f"{subject} removes nothing at any of the sites that it is tried at"
    if model is not None:
        run = check_model(subject, nothing, Traced(model), tuple(inputs or ()))
        assert run.layers, f"{subject} does not act in {type(model).__name__}: {run.refusals or 'no site was offered'}"
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _check_small_models(subject, nothing)


def _check_small_models(method: Method, nothing: Method) -> None:
    runs: list[Run] = []
    torn = not (isinstance(method, Reduction) and method.merges)
    models: list[tuple[Callable[[], nn.Module], Any]] = [(TinyViT, pixels), (TinyText, words)]
    models.append((TinyPrompt, prompt if torn else whole_prompt))
    if isinstance(method, AttentionRewrite):
        models = [(TinyDecoder, partial(text, tokens=long_enough(method)))]
    for kind, make in models:
        tried = any(run.layers for run in runs)
        runs.append(check_model(method, nothing, small(kind, make), make(3)))
        if runs[-1].layers and not tried:
            check_type(method, small(kind, make, torch.bfloat16), make(1), torch.bfloat16)
            batches = [as_double(make(batch)) for batch in (3, 5)]
            if not check_dynamic(method, small(kind, make, torch.float64), batches, alone=False):
                small.cache_clear()
                check_dynamic(method, Traced(fresh(kind, torch.float64)), batches, alone=True)
    if not any(run.layers for run in runs):
        refusals = "; ".join(refusal for run in runs for refusal in run.refusals)
        raise AssertionError(f"{method} acts in no model: {refusals or 'no site was offered'}")


@cache
def small(kind: Callable[[], nn.Module], make: Any, dtype: torch.dtype = torch.float32) -> Traced:
    """One of the small models, for inputs of one kind: traced for the first method that is checked, and no other."""
    return Traced(fresh(kind, dtype))


def fresh(kind: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """With the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().to(dtype).eval()


def pixels(batch: int) -> tuple[Tensor, ...]:
    """Input of TinyViT."""
    return (torch.randn(batch, 3, 12, 12),)


def words(batch: int) -> tuple[Tensor, ...]:
    """Input of TinyText: every second sample ends in four words of padding."""
    padding = 4 * (torch.arange(batch) % 2)
    return torch.randint(0, 50, (batch, 21)), torch.arange(21) < 21 - padding.unsqueeze(1)


def whole_prompt(batch: int) -> tuple[Tensor, ...]:
    """Input of TinyPrompt of which no word stands between image tokens."""
    return prompt(batch, torn=False)


def prompt(batch: int, *, torn: bool = True) -> tuple[Tensor, ...]:
    """Input of TinyPrompt: the image starts at another place in each sample; `torn`, a word stands in its middle."""
    ids = torch.randint(1, 50, (batch, 21))
    first = 2 + torch.arange(batch).unsqueeze(1) % 5
    rows = first + torch.arange(9) + torn * (torch.arange(9) > 4)
    return ids.scatter(1, rows, 0), torch.randn(batch, 3, 6, 6)


def text(batch: int, tokens: int) -> tuple[Tensor, ...]:
    """Input of TinyDecoder."""
    return (torch.randint(0, 50, (batch, tokens)),)


def as_double(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Floating-point inputs in float64."""
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def idle(method: AnyMethod) -> AnyMethod:
    """The same method with options that change nothing: `r=0`, `ratio=0`, `keep=1`, `coverage=0`, `keyframe=1` or
    `sparsity=0`; no `exit`."""
    names = {field.name for field in fields(method)}
    options: dict[str, Any] = {name: None for name in ("keep", "grid", "exit", "threshold") if name in names}
    for name, value in (("r", 0), ("ratio", 0.0), ("keep", 1.0), ("coverage", 0.0), ("keyframe", 1), ("sparsity", 0.0)):
        if name in names:
            return replace(method, **options | {name: value})
    lacks = "no option r, ratio or keep, nor coverage, keyframe or sparsity"
    raise AssertionError(f"{method.name} has {lacks}, by which it could be told to remove nothing")


def _one(method: Method | type[Method] | str) -> Method:
    recipe = parse_recipe(method() if isinstance(method, type) else method)
    assert len(recipe.methods) == 1, f"check_method takes one method, not {len(recipe.methods)}: {recipe}"
    return recipe.methods[0]
