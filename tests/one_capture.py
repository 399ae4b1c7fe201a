"""One run of Dynamo, and one capture, for a model that is compiled in many ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """By the names of the ways: the compiled graph, and its report. Passes leave the captured graph as it is."""
    functions, reports = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        captured: list[fx.GraphModule] = []
        capture = pipeline.capture

        def once(gm: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
            if not captured:
                captured.append(capture(gm, inputs))
            return captured[0]

        patch.setattr(pipeline, "capture", once)
        for name, options in ways.items():
            functions[name], reports[name] = pipeline.compile_graph(gm, inputs, options, lambda stage, graph: None)
    return functions, reports


class Switch:
    """A backend that compiles a model's only graph in several ways; `way` names the one that runs."""

    def __init__(self, ways: Mapping[str, Options]):
        self.ways, self.way = ways, ""
        self.reports: dict[str, GraphReport] = {}

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        assert not self.reports, "one graph, compiled once"
        functions, self.reports = compile_in_ways(gm, inputs, self.ways)
        return lambda *args: functions[self.way](*args)
