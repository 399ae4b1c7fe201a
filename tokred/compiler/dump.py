"""What `dump=` writes: one set of readable files per stage of the pipeline, and the report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
from torch import fx

from tokred.compiler.capture import module_path, source_line
from tokred.compiler.flow import flow_dot, flow_svg, graph_to_networkx, shape_text
from tokred.compiler.html import write_html
from tokred.compiler.page import details, page
from tokred.compiler.report import Report

__all__ = ["dump_report", "dump_stage", "graph_to_networkx", "readable"]

FREED = re.compile(r";  (\w+ = )+None$")  # fx frees each value after its last use: noise to a reader
ASSIGNED = re.compile(r"^ +(\w+)(?: : [^=]+)? = ")
SHAPE_COLUMN = 88


def dump_stage(folder: Path, index: int, stage: str, graph_module: fx.GraphModule) -> None:
    """Write `NN_stage` as .py (code with shapes), .dot, .svg, .html and .graphml into `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{index:02d}_{stage}"
    graph = graph_to_networkx(graph_module)
    code, drawing = readable(graph_module), flow_svg(graph)
    title = f"{index:02d} {stage}: {len(graph)} nodes"
    body = f'<div class="flow">{drawing}</div>' + details("code", code)
    for suffix, text in ((".py", code), (".dot", flow_dot(graph)), (".svg", drawing), (".html", page(title, body))):
        _beside(path, suffix).write_text(text, encoding="utf-8")
    nx.write_graphml_xml(graph, _beside(path, ".graphml"))


def dump_report(folder: Path, report: Report) -> None:
    """Write report.json (the documented schema) and report.html into `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.to_json(), indent=2) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    write_html(report, folder / "report.html")


def readable(graph_module: fx.GraphModule) -> str:
    """The code of a graph module and of the graphs inside it, each value with its shape and its user's source line."""
    parts = []
    for name, module in graph_module.named_modules():
        if isinstance(module, fx.GraphModule):
            heading = [f"# {name}"] if name else []
            parts.append("\n".join([*heading, *_code_lines(module)]))
    return "\n\n\n".join(parts) + "\n"


def _code_lines(module: fx.GraphModule) -> Iterator[str]:
    nodes = {node.name: node for node in module.graph.nodes}
    seen = ""
    for line in module.graph.python_code("self").src.strip("\n").splitlines():
        plain = FREED.sub("", line).rstrip()
        match = ASSIGNED.match(plain)
        node = nodes.get(match[1]) if match else None
        if node is not None and (place := _place(node)) and place != seen:
            seen = place
            yield f"\n    # {place}"
        yield _commented(plain, shape_text(node.meta.get("val"))) if node is not None else plain
        if plain.startswith("def "):
            yield from map(_input_line, module.graph.find_nodes(op="placeholder"))


def _input_line(node: fx.Node) -> str:
    """What the caller passes here: in a captured graph the name tells which parameter it is."""
    known = (node.name, shape_text(node.meta.get("val")), str(node.meta.get("source_name", "")))
    return "    # " + "  ".join(part for part in known if part)


def _place(node: fx.Node) -> str:
    """`layers.3.attention, vit.py:120`, as far as known."""
    source = source_line(node) if node.meta.get("stack_trace") else ""
    return ", ".join(part for part in (module_path(node), source) if part)


def _commented(line: str, shape: str) -> str:
    return f"{line.ljust(SHAPE_COLUMN)}  # {shape}" if shape else line


def _beside(path: Path, suffix: str) -> Path:
    """`with_suffix` would cut a stage name at its first dot."""
    return path.with_name(path.name + suffix)
