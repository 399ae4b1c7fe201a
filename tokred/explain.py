"""`tokred.explain`: compile nothing, run the rewritten graphs eagerly once, and report."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokred.compiler.options import parse_options
from tokred.compiler.pipeline import transform
from tokred.compiler.report import GraphReport, Report

__all__ = ["explain"]


def explain(model: Any, *args: Any, recipe: Any = None, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """What `recipe` does to `model` on these inputs: which blocks, which tokens, and why not elsewhere.

    Positional and keyword arguments are the model's own; `options` are the backend's. The model runs once, eagerly, on
    its rewritten graphs (that is where the token pictures come from); nothing is compiled and nothing is kept.
    Raises OptionError and RecipeError for bad input.
    """
    parsed = parse_options({**(options or {}), "recipe": recipe})
    graphs: list[GraphReport] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        done = transform(gm, example_inputs, parsed, lambda stage, graph: None)
        graphs.append(done.report)
        return (done.graph if done.changed else gm).forward

    with torch.no_grad(), torch._dynamo.config.patch(force_parameter_static_shapes=True):
        torch.compile(model, backend=backend, dynamic=False)(*args, **kwargs)
    return Report(graphs)
