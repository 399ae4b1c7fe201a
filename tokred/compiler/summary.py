"""From analysis and rewrite to the report's rows."""

from __future__ import annotations

from typing import Any

from torch import fx

from tokred.compiler.axes import Axes
from tokred.compiler.blocks import Attention, Blocks
from tokred.compiler.capture import module_path
from tokred.compiler.cost import Costs
from tokred.compiler.report import BlockReport, GraphReport

__all__ = ["model_name", "summarize"]


def model_name(gm: fx.GraphModule) -> str:
    """The class of the outermost module that the graph came from, or the function's name."""
    for node in gm.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = kind if isinstance(kind, str) else kind.__name__
            if str(path) == "L['self']":
                return name.rsplit(".", 1)[-1]
    for node in gm.graph.nodes:
        stack = node.meta.get("stack_trace") or ""
        if ", in " in stack:
            return stack.rsplit(", in ", 1)[1].splitlines()[0]
    return "graph"


def summarize(
    report: GraphReport, captured: fx.GraphModule, found: Blocks, blocks: Blocks, axes: Axes, reduced: Any, final: fx.GraphModule
) -> None:
    """Fill in blocks, costs and restores."""
    costs = Costs(captured, final)
    report.flops = costs.totals()
    now = {_identity(block): block for block in blocks.attentions}
    acted = {_identity(block): applied for block, applied in reduced.applied.items()}
    refused = {_identity(block): entry for block, entry in reduced.refused.items()}
    for block in found.attentions:
        key = _identity(block)
        row = BlockReport("attention", block.layer, block.module, (_show(block.tokens), _show(block.tokens)), block.form, block.source)
        row.flops = costs.block(block.module)
        current = now.get(key)
        if current is not None and _length(current.tokens) != _length(block.tokens):
            row.tokens = (_show(block.tokens), _show(current.tokens))
            row.note = "only these rows are read"
        if key in acted:
            applied = acted[key]
            row.method, row.tokens = str(applied.method), (_show(applied.place.tokens), _show(applied.after))
            row.note = applied.note
        elif key in refused:
            method, refusal = refused[key]
            row.method, row.refusal = str(method), refusal
        elif block.refusal is not None:
            row.refusal = block.refusal
        report.blocks.append(row)
    for mlp in found.mlps:
        row = BlockReport("mlp", mlp.layer, mlp.module, (_show(mlp.tokens), _show(mlp.tokens)), mlp.form, mlp.source)
        row.flops = costs.block(mlp.module)
        report.blocks.append(row)
    report.restores = [f"{node.name}: {why} ({where})" for node, (why, where) in reduced.restored.items()]


def _identity(block: Attention) -> tuple[str, int, str]:
    return (block.module or module_path(block.anchor), block.layer, block.form)


def _show(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def _length(size: Any) -> str:
    return str(size)
