"""One run of Dynamo, one capture, and one run of the exact passes, for a model that is compiled in many ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from torch import fx

from tokred.compiler import pipeline
from tokred.compiler.options import Options
from tokred.compiler.report import GraphReport

__all__ = ["Switch", "compile_in_ways"]


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
