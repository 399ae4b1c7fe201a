"""The few edits of an fx graph that passes share."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode

from tokred.compiler.capture import tensor_meta, trace_into
from tokred.compiler.graphs import as_module
from tokred.passes.indices import same_shape

__all__ = ["copy_graph", "erase_unused", "inherit", "keep_output_strides", "refresh"]

aten = torch.ops.aten

ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph with the same metadata, to be changed: the pipeline still reads the original."""
    graph = fx.Graph(tracer_cls=gm.graph._tracer_cls)
    env: dict[fx.Node, fx.Node] = {}
    output = graph.output(graph.graph_copy(gm.graph, env))
    output.meta = dict(gm.graph.output_node().meta)
    graph._codegen = gm.graph._codegen
    new = as_module(gm, graph)
    new.meta = dict(gm.meta)
    return new


def inherit(nodes: Iterable[fx.Node], origin: fx.Node) -> None:
    """New nodes come from where the node came from whose work they do."""
    for node in nodes:
        for key in ORIGIN:
            node.meta.pop(key, None)
            if key in origin.meta:
                node.meta[key] = origin.meta[key]


def erase_unused(graph: fx.Graph, before: set[fx.Node]) -> None:
    """Erase what an edit left without users; what had none `before` stays."""
    for node in reversed(list(graph.nodes)):
        pure = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable
        if pure and not node.users and node not in before:
            graph.erase_node(node)


def refresh(graph: fx.Graph, changed: Iterable[fx.Node]) -> None:
    """Bring metadata up to date after `changed` nodes got other strides, and views that these forbid to `reshape`."""
    stale = set(changed)
    mode = detect_fake_mode([node.meta["val"] for node in stale])
    with torch.no_grad(), enable_python_dispatcher(), mode or nullcontext():
        for node in graph.nodes:
            meta = tensor_meta(node)
            if (
                meta is None
                or stale.isdisjoint(node.all_input_nodes)
                or not isinstance(node.target, torch._ops.OpOverload)
            ):
                continue
            now = _recompute(node)
            if now is None or now.dtype != meta.dtype or same_shape(now.stride(), meta.stride()):
                continue
            node.meta["val"] = now
            stale.add(node)


def keep_output_strides(gm: fx.GraphModule, original: fx.GraphModule) -> None:
    """Outputs are laid out as the original's: the caller may `view` them."""
    output, before = gm.graph.output_node(), original.graph.output_node()
    for node, old in zip(output.all_input_nodes, before.all_input_nodes, strict=True):
        now, was = tensor_meta(node), tensor_meta(old)
        if now is None or was is None or same_shape(now.stride(), was.stride()) or node.op == "placeholder":
            continue
        if not all(isinstance(size, int) for size in (*was.stride(), *now.stride())):
            order = list(
                range(was.dim())
            )  # symbolic strides cannot be sorted; contiguous is what nearly all outputs are
        else:
            strides = was.stride()
            order = sorted(range(len(strides)), key=lambda d: (-strides[d], d))
        with gm.graph.inserting_before(output):
            new = trace_into(gm.graph, lambda x, order=order: _ordered(x, order), (node,))
        output.replace_input_with(node, new)


def _ordered(x: torch.Tensor, order: list[int]) -> torch.Tensor:
    """A copy whose dimensions lie in memory in this order, outermost first."""
    inverse = [order.index(d) for d in range(len(order))]
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)


def _recompute(node: fx.Node) -> Any:
    def value(x: Any) -> Any:
        return x.meta["val"] if isinstance(x, fx.Node) else x

    args = fx.node.map_aggregate(node.args, value)
    kwargs = fx.node.map_aggregate(dict(node.kwargs), value)
    target: Any = node.target
    if target._schema.is_mutable:
        return None
    return target(*args, **kwargs)
