"""Places and sites made of random numbers, of every kind that a method may meet."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from tokred.errors import ArgumentError
from tokred.registry.method import Reduction
from tokred.registry.site import Place, Site, Tower
from tokred.registry.spans import FOUND, derived

__all__ = ["make_site", "places"]

DEPTH = 12
HEADS, HEAD_DIM, CHANNELS = 4, 8, 32

SHAPES = (
    {"tokens": 37, "head": 1, "grid": (6, 6)},  # a ViT
    {"tokens": 35, "head": 0, "grid": (5, 7)},  # no class token, no side even
    {"tokens": 23, "head": 2, "tail": 1, "grid": (4, 5)},  # distillation in front, one more behind
    {"tokens": 24, "head": 1, "tail": 2},  # text
    {"tokens": 29, "span": 12, "whole": 16},  # a prompt with an image's tokens at other places in each sample
    {"tokens": 31, "span": 16, "whole": 16},  # the same before anything was removed
)


def places(method: Reduction) -> list[Place]:
    """Where the method would be asked: each shape that has what it needs, at the first and the last layer of those at
    which it removes something, or else at the first."""
    layers = [layer for layer in range(DEPTH) if method.acts_on(layer, DEPTH, f"blocks.{layer}.attn")] or [0]
    found = []
    for shape in SHAPES:
        tried = [Place(layer=layer, depth=DEPTH, **shape) for layer in layers]
        tried = [place for place in tried if _fits(method, place)]
        acting = [place for place in tried if method.removed(place)] or tried[:1]
        found += acting[:1] + acting[1:][-1:]
    return found


def _fits(method: Reduction, place: Place) -> bool:
    """Whether a method that needs this much is asked here, and does not refuse."""
    needs = method.needs_at(place.layer, place.depth)
    if ("class_token" in needs and not place.head) or ("grid" in needs and place.grid is None):
        return False
    if "visual" in needs and place.span is None:
        return False
    if "tower" in needs and place.free != place.whole:
        return False
    if place.span is not None and not method.causal_safe and method.merges != "visual":
        return False
    try:
        method.removed(place)
    except ArgumentError:
        return False
    return True


def make_site(
    place: Place,
    *,
    batch: int = 3,
    dtype: torch.dtype = torch.float32,
    padded: bool = False,
    sized: bool = False,
    seed: int = 0,
) -> Site:
    """A site at `place` with random tensors; `padded`, the last quarter of odd samples is padding; `sized`, rows stand
    for one to three tokens each, as after an earlier merge."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens, wide = place.tokens, torch.float64 if dtype == torch.float64 else torch.float32
    valid = mask = size = None
    if padded:
        length = torch.tensor([tokens - tokens // 4 * (sample % 2) for sample in range(batch)])
        valid = torch.arange(tokens) < length.unsqueeze(1)  # [B N]
        mask = valid[:, None, None, :]
    if sized:
        size = torch.randint(1, 4, (batch, tokens), generator=generator).to(wide)
        size = size if valid is None else size * valid
    inside = None
    if place.span is not None:
        order = torch.rand(batch, tokens, generator=generator).argsort(dim=-1)
        inside = torch.zeros(batch, tokens, dtype=torch.bool).scatter(1, order[:, : place.span], True)
    rows = torch.arange(tokens).expand(batch, -1)
    visual = (rows >= place.head) & (rows < tokens - place.tail) if inside is None else inside
    tower = None
    if place.span is not None and place.span == place.whole:
        patches = (batch, place.span)
        weight = normal(CHANNELS + 4, CHANNELS)
        tower = Tower(
            hidden=normal(*patches, CHANNELS + 4),
            key=normal(*patches, HEAD_DIM),
            attention=normal(*patches).softmax(-1),
            earlier=normal(batch, 2, place.span).softmax(-1),
            patches=place.span // 2,
            project=lambda rows: rows @ weight.to(rows.dtype),
        )
    numbers = {field.name: getattr(place, field.name) for field in fields(Place)}
    heads = (batch, HEADS, tokens, HEAD_DIM)
    return Site(
        **numbers,
        hidden=normal(batch, tokens, CHANNELS),
        query=normal(*heads),
        key=normal(*heads),
        value=normal(*heads),
        size=size,
        valid=valid,
        mask=mask,
        inside=inside,
        spans={name: derived(name, visual, valid) for name in FOUND},
        tower=tower,
        neurons=normal(batch, tokens, 2 * CHANNELS),
        prepared=torch.rand(batch, tokens, generator=generator, dtype=torch.float64).to(wide),
    )
