"""`tokred.explain`: run the rewritten graphs eagerly once, and report what was done where, and why not elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from tokred.compiler.extras import supplier
from tokred.compiler.options import parse_options
from tokred.compiler.pipeline import Compiled, transform
from tokred.compiler.report import GraphReport, Report, TokenPicture

__all__ = ["as_compiled", "explain"]


def explain(model: Any, *args: Any, recipe: Any = None, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """What `recipe` does to `model` on these inputs: which blocks, which tokens, and why not elsewhere.

    Positional and keyword arguments are the model's own; `options` are the backend's. The model runs once, eagerly, on
    its rewritten graphs (the token pictures come from that run); nothing is compiled and no report is kept.
    Raises OptionError and RecipeError for bad input, StrictError under `strict=True`.
    """
    parsed = replace(parse_options({**(options or {}), "recipe": recipe}), texts=True)
    graphs: list[GraphReport] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        done = transform(gm, example_inputs, parsed, lambda stage, graph: None, trace=True)
        graphs.append(done.report)
        return _traced(done, gm)

    plain = getattr(model, "_orig_mod", model)  # a model that is compiled already is explained as it was before
    # Dynamo counts what else this model was compiled with, and would run the ninth variant as it stands.
    limits: dict[str, Any] = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), 1 << 16)
    for whole in (None, False):
        graphs.clear()
        with torch.no_grad(), torch._dynamo.config.patch(limits), as_compiled(plain, whole):
            compiled: Any = torch.compile(plain, backend=backend, dynamic=False)
            try:
                compiled(*args, **kwargs)
                break
            except (GuardOnDataDependentSymNode, UserError):
                if whole is False or not getattr(plain, "can_generate", bool)():
                    raise
    return Report(graphs)


def as_compiled(model: Any, whole: bool | None = None) -> AbstractContextManager[None]:
    """What `tokred.compile` sets for a generating model, which it traces in pieces where that fails."""
    if not getattr(model, "can_generate", bool)():
        return nullcontext()
    from tokred.generation import traced_whole

    return traced_whole(model, vision=whole)


def _traced(done: Compiled, gm: fx.GraphModule) -> Any:
    """Run the traced graph, put its extra results into the report as pictures, and return the model's own."""
    if not done.changed:
        return gm.forward

    supply = supplier(done.graph, fresh=True)

    def call(*inputs: Any) -> Any:
        results = list(done.graph(*inputs, *supply(inputs)))
        if not done.report.pictures:
            done.report.pictures = _pictures(done.applied, results[len(results) - len(done.applied) :])
            done.report.image = _image(inputs)
        return tuple(results[: done.own])

    return call


def _pictures(applied: list[Any], groups: list[Tensor]) -> list[TokenPicture]:
    """Compose each site's map with those before it on its axis: original token -> present row, for the first sample."""
    places: dict[Any, Tensor] = {}
    first: dict[Any, Any] = {}
    pictures = []
    for site, rows in zip(applied, groups, strict=True):
        stage, place = site.stage, site.place
        root = first.setdefault(stage.root, place)
        origin = places.get(stage.parent, torch.arange(rows.shape[1]))
        now = torch.where(origin >= 0, rows[0].cpu()[origin.clamp(min=0)], -1)
        places[stage] = now
        pictures.append(TokenPicture(place.layer, str(site.method), now.tolist(), (root.head, root.tail), root.grid))
    return pictures


def _image(inputs: tuple[Any, ...]) -> Tensor | None:
    """The first sample of the first input that looks like a batch of images, as [H W 3] in 0..1."""
    for value in inputs:
        if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) and value.dim() == 4:
            if value.shape[1] in (1, 3) and value.is_floating_point() and min(value.shape[2:]) >= 8:
                image = value[0].detach().float().cpu()
                low, high = image.amin(), image.amax()
                return ((image - low) / (high - low).clamp(min=1e-6)).expand(3, -1, -1).permute(1, 2, 0)
    return None
