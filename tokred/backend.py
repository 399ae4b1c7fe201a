"""The entry points: the `torch.compile` backend, `compile`, `explain`, `reports`, `reset`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import fx

from tokred.compiler.dump import dump_report, dump_stage
from tokred.compiler.options import Options, parse_options
from tokred.compiler.pipeline import compile_graph
from tokred.compiler.relaid import Relaid
from tokred.compiler.report import GraphReport, Report

__all__ = ["backend", "compile", "reports", "reset"]

log = logging.getLogger("tokred")

_reports: list[GraphReport] = []


def backend(
    gm: fx.GraphModule, example_inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """`torch.compile(model, backend="tokred", options={...})`.

    Raises OptionError and RecipeError for bad input, StrictError under `strict=True`; anything else that cannot be
    rewritten is compiled unchanged and reported.
    """
    return _compile(gm, example_inputs, parse_options(options, mode))


def _compile(gm: fx.GraphModule, example_inputs: list[Any], parsed: Options) -> Callable[..., Any]:
    function, report = compile_graph(gm, example_inputs, parsed, _observer(parsed))
    if parsed.dump is not None:
        dump_report(_folder(parsed.dump), Report([report]))
    _reports.append(report)
    log.info("%s", Report([report]))
    return function


def _observer(options: Options) -> Callable[[str, fx.GraphModule], None]:
    """What happens after each stage: a log line, and a file if the user asked for a dump."""
    stages = count()

    def observe(stage: str, graph: fx.GraphModule) -> None:
        if log.isEnabledFor(logging.DEBUG):
            log.debug("after %s\n%s", stage, graph.print_readable(print_output=False))
        if options.dump is not None:
            dump_stage(_folder(options.dump), next(stages), stage, graph)

    return observe


def _folder(dump: Path) -> Path:
    """One folder a graph: a model that Dynamo breaks into pieces has several."""
    return dump / f"graph_{len(_reports):02d}" if len(_reports) else dump


def compile(
    model: Any,
    recipe: Any = None,
    *,
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    **options: Any,
) -> Any:
    """`torch.compile(model, backend="tokred")` with the recipe as an argument; other keywords are its options.

    Unlike torch.compile, bad options are raised here and not at the first call. (`mode` goes to Inductor unchanged.)
    A transformers model with `generate()` comes back as one that shares its parameters and whose caches know which
    tokens they hold, so that generation goes on correctly behind a prefill that dropped some.
    """
    recipe = parse_options({"recipe": recipe, **options}, mode).recipe  # the same methods for all graphs
    companion = isinstance(model, torch.nn.Module) and getattr(model, "can_generate", bool)()

    def tokred(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return _compile(gm, example_inputs, parse_options({"recipe": recipe, **options}, mode, companion=companion))

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend=tokred, fullgraph=fullgraph, dynamic=dynamic)

    if not companion:
        return compiled(model)
    from tokred.generation import with_pruned_caches  # imports transformers, which such a model has

    return with_pruned_caches(model, compiled)


def reports() -> Report:
    """What was compiled since `reset()`, one entry a graph."""
    return Report(list(_reports))


def reset() -> None:
    """Forget all reports, and what was made of parameters: it is made again at the next call."""
    _reports.clear()
    Relaid.forget()
