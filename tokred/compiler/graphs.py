"""What the block finders ask of a captured graph: what projects, what reaches what, what lies between."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from tokred.compiler.relations import Op

__all__ = ["CONVOLUTIONS", "PRODUCTS", "ancestors", "as_module", "between", "nearest", "projects", "reaches", "times"]

aten = torch.ops.aten

PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.mm.default, aten.einsum.default}
LINEAR = {aten.linear.default, aten.addmm.default, aten.mm.default}
CONVOLUTIONS = {aten.conv2d.default, aten.conv1d.default}


def as_module(source: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module that runs `graph`, with the attributes of `source`. Its Python code is written when it is first run or
    printed, as most graphs between two passes never are."""
    return _LazyGraphModule(source, graph)


def projects(node: fx.Node) -> bool:
    """A linear layer, or a convolution that is one (kernel of size 1, not grouped)."""
    if node.target in LINEAR:
        return True
    if node.target not in CONVOLUTIONS:
        return False
    op = Op(node)
    return op["groups"] == 1 and all(size == 1 for size in op.shape("weight")[2:])


def reaches(early: fx.Node, late: fx.Node) -> bool:
    """Whether the later node depends on the earlier one."""
    queue, seen = [late], {late}
    while queue:
        for source in queue.pop().all_input_nodes:
            if source is early:
                return True
            if source not in seen and early < source:
                seen.add(source)
                queue.append(source)
    return False


def ancestors(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """These nodes and all that they are computed from, in order."""
    found = set(nodes)
    queue = list(found)
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                queue.append(source)
    return sorted(found)


def nearest(value: fx.Node, kinds: Container[Any]) -> set[fx.Node]:
    """The ops of these kinds that a value is computed from without another one of them in between; itself, if it is."""
    found: set[fx.Node] = set()
    queue, seen = [value], {value}
    while queue:
        node = queue.pop()
        if node.target in kinds:
            found.add(node)
            continue
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return found


def between(start: fx.Node, end: fx.Node) -> Any:
    """The graph of all paths from one node to another."""
    graph: Any = nx.DiGraph()
    queue, seen = [end], {end}
    while queue:
        node = queue.pop()
        for source in node.all_input_nodes:
            if source is start or start < source:
                graph.add_edge(source, node)
                if source not in seen and source is not start:
                    seen.add(source)
                    queue.append(source)
    if start not in graph:
        return graph
    return graph.subgraph(nx.descendants(graph, start) | {start})


def times(sizes: Any) -> Any:
    """The product of sizes, which may be symbols."""
    total: Any = 1
    for size in sizes:
        total = total * size
    return total
