"""An FX graph as a networkx graph, and as a drawing: layers from top to bottom, no graphviz needed."""

from __future__ import annotations

from html import escape
from typing import Any

import networkx as nx
import torch
from torch import fx

from tokred.compiler.capture import module_path, source_line

__all__ = ["flow_dot", "flow_svg", "graph_to_networkx", "shape_text"]

SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b8",
}  # fmt: skip
COLOURS = {"placeholder": "#e7ecf4", "get_attr": "#e7ecf4", "output": "#d8f0df", "call_function": "#ffffff"}
HEAVY = ("linear", "mm", "bmm", "matmul", "conv", "attention")  # what costs: worth a colour of its own
HEAVY_COLOUR = "#ffe2c4"
WIDE, HIGH, GAP_X, GAP_Y = 168, 34, 14, 30  # pixels: a box, and the space between boxes
TOLD = ("target", "parameter", "shape", "module", "source")  # under the mouse
SWEEPS = 4  # barycentre ordering settles after a few


def graph_to_networkx(gm: fx.GraphModule) -> nx.DiGraph[str]:
    """One vertex a node, in program order and by name, with what is known of it as text; one edge a use."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for order, node in enumerate(gm.graph.nodes):
        graph.add_node(
            node.name,
            order=order,
            op=node.op,
            target=_target_text(node),
            parameter=str(node.meta.get("source_name", "")),
            shape=shape_text(node.meta.get("val")),
            module=module_path(node),
            source=source_line(node) if node.meta.get("stack_trace") else "",
        )
        graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return graph


def shape_text(value: Any) -> str:
    """`f32[8, 197, 384]` of a tensor, the same in parentheses for several; a symbol or number as it prints."""
    if isinstance(value, torch.Tensor):
        return f"{SHORT.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(shape_text, value))})"
    return "" if value is None else str(value)


def flow_dot(graph: nx.DiGraph[str]) -> str:
    """The graph in Graphviz's language, for those who have it."""
    lines = ["digraph {", '  node [shape=box style=filled fontname="sans-serif" fontsize=10]']
    for name, data in graph.nodes(data=True):
        label = "\\n".join(_quoted(part) for part in _labels(name, data) if part)
        lines.append(f'  "{_quoted(name)}" [label="{label}" fillcolor="{_colour(data)}"]')
    lines += [f'  "{_quoted(source)}" -> "{_quoted(user)}"' for source, user in graph.edges]
    return "\n".join([*lines, "}", ""])


def flow_svg(graph: nx.DiGraph[str]) -> str:
    """A drawing: inputs stand one layer above their first user, each layer is ordered to keep edges short."""
    places = _places(_ordered(graph, _layers(graph)))
    wide = max((x for x, _ in places.values()), default=0) + WIDE + GAP_X
    high = max((y for _, y in places.values()), default=0) + HIGH + GAP_X
    edges = "".join(_edge(places[source], places[user]) for source, user in graph.edges)
    boxes = "".join(_box(places[name], name, data) for name, data in graph.nodes(data=True))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" '
        f'font-family="sans-serif" font-size="10">'
        f'<g fill="none" stroke="#8a94a6">{edges}</g><g stroke="#667085">{boxes}</g></svg>'
    )


def _layers(graph: nx.DiGraph[str]) -> list[list[str]]:
    """Longest paths from the top; a node without inputs (a parameter) sinks to just above its first user."""
    depth: dict[str, int] = {}
    for name in nx.topological_sort(graph):
        depth[name] = 1 + max((depth[source] for source in graph.predecessors(name)), default=-1)
    for name in graph:
        if graph.in_degree(name) == 0 and graph.out_degree(name) > 0:
            depth[name] = min(depth[user] for user in graph.successors(name)) - 1
    layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for name in graph:
        layers[depth[name]].append(name)
    return [layer for layer in layers if layer]


def _ordered(graph: nx.DiGraph[str], layers: list[list[str]]) -> list[list[str]]:
    """Sugiyama's barycentre heuristic: each node moves to the mean place of its neighbours, layer by layer."""
    for sweep in range(SWEEPS):
        downwards = sweep % 2 == 0
        place = {name: index - len(layer) / 2 for layer in layers for index, name in enumerate(layer)}
        for layer in layers if downwards else reversed(layers):
            wanted = {}
            for index, name in enumerate(layer):
                near = list(graph.predecessors(name) if downwards else graph.successors(name))
                own = index - len(layer) / 2
                wanted[name] = sum(place[other] for other in near) / len(near) if near else own
            layer.sort(key=wanted.__getitem__)
            place.update({name: index - len(layer) / 2 for index, name in enumerate(layer)})
    return layers


def _places(layers: list[list[str]]) -> dict[str, tuple[int, int]]:
    """The top left corner of each box, layers centred on one axis."""
    widest = max(map(len, layers), default=0) * (WIDE + GAP_X)
    return {
        name: (
            GAP_X + (widest - len(layer) * (WIDE + GAP_X)) // 2 + index * (WIDE + GAP_X),
            GAP_X + row * (HIGH + GAP_Y),
        )
        for row, layer in enumerate(layers)
        for index, name in enumerate(layer)
    }


def _edge(source: tuple[int, int], user: tuple[int, int]) -> str:
    (x0, y0), (x1, y1) = source, user
    start, end = (x0 + WIDE // 2, y0 + HIGH), (x1 + WIDE // 2, y1)
    bend = (end[1] - start[1]) // 2
    return f'<path d="M{start[0]} {start[1]}c0 {bend} {end[0] - start[0]} {bend} {end[0] - start[0]} {2 * bend}"/>'


def _box(place: tuple[int, int], name: str, data: dict[str, Any]) -> str:
    x, y = place
    rows = [_shortened(part) for part in _labels(name, data)]
    title = "\n".join(part for part in (name, *(data[key] for key in TOLD)) if part)
    return (
        f'<g class="node" data-name="{escape(name)}"><title>{escape(title)}</title>'
        f'<rect x="{x}" y="{y}" width="{WIDE}" height="{HIGH}" rx="4" fill="{_colour(data)}"/>'
        + "".join(
            f'<text x="{x + 6}" y="{y + 14 + 13 * row}" stroke="none" fill="#1c2330">{escape(text)}</text>'
            for row, text in enumerate(rows)
        )
        + "</g>"
    )


def _labels(name: str, data: dict[str, Any]) -> tuple[str, str]:
    return data["parameter"] or name, data["shape"]


def _shortened(text: str, longest: int = 30) -> str:
    """The end of a parameter's name tells more than its start."""
    return text if len(text) <= longest else "…" + text[1 - longest :]


def _colour(data: dict[str, Any]) -> str:
    if data["op"] == "call_function" and any(word in data["target"] for word in HEAVY):
        return HEAVY_COLOUR
    return COLOURS.get(data["op"], COLOURS["call_function"])


def _target_text(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else torch.typename(node.target)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
