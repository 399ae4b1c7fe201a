"""One run of Dynamo, one capture, and one run of the exact passes, for a model that is compiled in many ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx

from tokred.compiler import pipeline
from tokred.compiler.options import Options, parse_options
from tokred.compiler.report import GraphReport
from tokred.generation import with_pruned_caches

__all__ = ["Switch", "Ways", "compile_in_ways"]


def compile_in_ways(
    gm: fx.GraphModule, inputs: list[Any], ways: Mapping[str, Options]
) -> tuple[dict[str, Callable[..., Any]], dict[str, GraphReport]]:
    """By the names of the ways: the compiled graph, and its report. Passes leave the graphs that they read alone."""
    functions, reports = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        captured: list[fx.GraphModule] = []
        capture = pipeline.capture

        def once(gm: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
            if not captured:
                captured.append(capture(gm, inputs))
            return captured[0]

        patch.setattr(pipeline, "capture", once)
        patch.setattr(pipeline, "_exact", _once_for_each_graph(pipeline._exact))
        patch.setattr(pipeline, "Axes", cache(pipeline.Axes))
        for name, options in ways.items():
            functions[name], reports[name] = pipeline.compile_graph(gm, inputs, options, lambda stage, graph: None)
    return functions, reports


def _once_for_each_graph(exact: Callable[..., fx.GraphModule]) -> Callable[..., fx.GraphModule]:
    """The stage of the exact passes, which reads these options alone; what it reports and shows is said each time."""
    done: dict[Any, tuple[fx.GraphModule, GraphReport, list[tuple[str, fx.GraphModule]]]] = {}

    def run(graph: fx.GraphModule, options: Options, report: GraphReport, observe: Any, leave_out: str = "") -> Any:
        asked = (graph, options.exact, options.lower, options.passes, leave_out)
        if asked not in done:
            alone = GraphReport(model=report.model)
            shown: list[tuple[str, fx.GraphModule]] = []
            result = exact(graph, options, alone, lambda stage, after: shown.append((stage, after)), leave_out)
            done[asked] = result, alone, shown
        result, alone, shown = done[asked]
        report.passes += [replace(entry) for entry in alone.passes]
        for stage in shown:
            observe(*stage)
        return result

    return run


class Switch:
    """A backend that compiles a model's graphs, each once, in several ways; `way` names the one that runs.

    reports     by way, of the last graph
    """

    def __init__(self, ways: Mapping[str, Options], *, graphs: int = 1):
        self.ways, self.way, self.left = ways, "", graphs
        self.reports: dict[str, GraphReport] = {}

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        assert self.left, "a graph more than said"
        self.left -= 1
        functions, self.reports = compile_in_ways(gm, inputs, self.ways)
        return lambda *args: functions[self.way](*args)


class Ways:
    """A backend that compiles every graph of a model in several ways; `way` names the one that runs.

    Ways are named by their recipes, or have options of their own; `common` ones hold for all. `reports` has a list for
    each way, a report a graph.
    """

    def __init__(self, ways: Iterable[str] | Mapping[str, Mapping[str, Any]], **common: Any):
        own = ways if isinstance(ways, Mapping) else {name: {} for name in ways}
        self.options = {name: {"recipe": name, "lower": "eager", **common, **options} for name, options in own.items()}
        self.way, self.companion = next(iter(self.options)), False
        self.reports: dict[str, list[GraphReport]] = {name: [] for name in self.options}

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        parsed = {name: parse_options(given, None, companion=self.companion) for name, given in self.options.items()}
        functions, reports = compile_in_ways(gm, inputs, parsed)
        for name, report in reports.items():
            self.reports[name].append(report)
        return lambda *args: functions[self.way](*args)

    def __iter__(self) -> Iterator[str]:
        """The names of the ways, each while it is the one that runs."""
        for name in self.options:
            self.way = name
            yield name

    def compile(self, model: Any, **how: Any) -> Any:
        """As `torch.compile` does with tokred's backend."""
        return torch.compile(model, backend=self, fullgraph=True, **how)

    def generating(self, model: Any) -> Any:
        """As `tokred.compile` does with a model that generates."""
        self.companion = True
        return with_pruned_caches(model, self.compile)

    @property
    def report(self) -> GraphReport:
        """Of the only graph, the way that runs now."""
        (graph,) = self.reports[self.way]
        return graph
