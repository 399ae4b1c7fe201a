"""vmap in Dynamo's graph: the calls that open and close it stand there, with calls on batched tensors between them.

A trace before dispatch cannot run those (it meets a batched tensor where it expects its own). A trace behind the
batching can: each stretch is traced by itself, and the plain ATen calls that it stands for take its place.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.predispatch import _vmap_decrement_nesting, _vmap_increment_nesting
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["open_vmaps"]


def open_vmaps(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph without vmaps; `gm` itself if it has none."""
    stretches = _stretches(gm.graph)
    if not stretches:
        return gm
    mode = detect_fake_mode([node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")])
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    first = {stretch[0]: stretch for stretch in stretches}
    inside = {node for stretch in stretches for node in stretch}
    for node in gm.graph.nodes:
        if node in first:
            _inline(gm, graph, env, first[node], mode)
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], env.__getitem__))
        elif node not in inside:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.lint()
    return fx.GraphModule(gm, graph)


def _stretches(graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes from each outermost opening to its closing."""
    found: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        if node.target is _vmap_increment_nesting:
            if depth == 0:
                found.append([])
            depth += 1
        if depth:
            found[-1].append(node)
        depth -= node.target is _vmap_decrement_nesting
    return found


def _inline(gm: fx.GraphModule, graph: fx.Graph, env: dict[fx.Node, Any], stretch: list[fx.Node], mode: Any) -> None:
    """Trace a stretch on what it reads, under the placeholders' fake mode, and append the calls to `graph`."""
    members = set(stretch)
    outside = list(dict.fromkeys(n for node in stretch for n in node.all_input_nodes if n not in members))
    results = [node for node in stretch if any(user not in members for user in node.users)]
    piece = fx.Graph()
    inner: dict[fx.Node, Any] = {node: piece.placeholder(node.name) for node in outside}
    for node in stretch:
        inner[node] = piece.node_copy(node, inner.__getitem__)
    piece.output(tuple(inner[node] for node in results))
    values = [_like(node.meta["example_value"], mode) for node in outside]
    with torch.no_grad(), enable_python_dispatcher(), mode or nullcontext():
        traced = make_fx(fx.GraphModule(gm, piece))(*values)
    made: dict[fx.Node, Any] = dict(
        zip(traced.graph.find_nodes(op="placeholder"), (env[node] for node in outside), strict=True)
    )
    for node in traced.graph.nodes:
        if node.op == "call_function":
            made[node] = graph.node_copy(node, made.__getitem__)
            made[node].meta = {"example_value": node.meta.get("val"), "stack_trace": stretch[0].meta.get("stack_trace")}
        elif node.op != "placeholder" and node.op != "output":
            raise NotImplementedError(f"a vmap that holds a {node.op}")
    for node, result in zip(results, traced.graph.output_node().args[0], strict=True):  # type: ignore[arg-type]
        env[node] = made[result]


def _like(value: Any, mode: Any) -> Any:
    """Dynamo's intermediate values were made under a mode of its own."""
    if not isinstance(value, torch.Tensor) or mode is None or getattr(value, "fake_mode", None) is mode:
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
