"""From analysis and rewrite to the report's rows."""

from __future__ import annotations

import ast
import linecache
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from operator import itemgetter
from typing import Any

import sympy
import torch
from torch import fx

from tokred.compiler.axes import Axes
from tokred.compiler.blocks import Attention, Blocks, Mlp
from tokred.compiler.capture import module_path, tensor_meta
from tokred.compiler.cost import Costs
from tokred.compiler.report import BlockReport, GraphReport

__all__ = ["model_name", "summarize"]


def model_name(gm: fx.GraphModule) -> str:
    """The outermost class that the graph's first call came through, or the outermost function."""
    for node in gm.graph.nodes:
        frames = re.findall(r'File "(.+)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
        if frames and node.op not in ("placeholder", "output"):
            classes = (_class_around(file, int(line)) for file, line, _ in frames)
            return next((name for name in classes if name), None) or str(frames[0][2])
    return "graph"


def _class_around(file: str, line: int) -> str | None:
    """The innermost class whose body holds a line of a source file, if the file can be read."""
    found = _classes("".join(linecache.getlines(file)))
    around = [(start, name) for start, stop, name in found if start <= line <= stop]
    return max(around)[1] if around else None


@lru_cache(maxsize=32)
def _classes(source: str) -> list[tuple[int, int, str]]:
    """Of each class its first and last line and its name."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return [(node.lineno, node.end_lineno or node.lineno, node.name) for node in classes]


def summarize(
    report: GraphReport,
    captured: fx.GraphModule,
    found: Blocks,
    blocks: Blocks,
    axes: Axes,
    reduced: Any,
    rewritten: Any,
    lighter: Iterable[Any],
    final: fx.GraphModule,
) -> None:
    """Fill in blocks, costs and restores. `lighter`: what passes made of the weights, one after the other."""
    costs = Costs(captured, final)
    report.flops = costs.totals()
    place = {node: number for number, node in enumerate(captured.graph.nodes)}
    attentions = list(zip(found.attentions, _attention_rows(found, blocks, reduced, costs), strict=True))
    for block, row in attentions:
        _show_rewritten(row, _identity(block), rewritten, reduced)
    rows = [(place[block.anchor], row) for block, row in attentions]
    rows += [(place[mlp.down], _mlp_row(mlp, costs)) for mlp in found.mlps]
    shown = [row for _, row in sorted(rows, key=itemgetter(0))]
    for entry in lighter:
        _show_sparse(shown, entry)
    report.blocks += shown
    report.restores = [f"{node.name}: {why} ({where})" for node, (why, where) in reduced.restored.items()]


def _attention_rows(found: Blocks, blocks: Blocks, reduced: Any, costs: Costs) -> list[BlockReport]:
    """`found` is what the user wrote, `blocks` what the exact passes left of it, on which methods were tried."""
    now = {_identity(block): block for block in blocks.attentions}
    acted = {_identity(block): applied for block, applied in reduced.applied.items()}
    refused = {_identity(block): entry for block, entry in reduced.refused.items()}
    returned = {_identity(block): entry for block, entry in reduced.returned.items()}
    modules = Counter(block.module for block in found.attentions)
    calls: Counter[str] = Counter()
    linears = [node for mlp in found.mlps for node in mlp.products]
    rows = []
    for block in found.attentions:
        key = _identity(block)
        row = BlockReport("attention", block.layer, block.module, (_show(block.tokens),) * 2, block.form, block.source)
        row.flops = costs.block(block.module, calls[block.module], modules[block.module], linears)
        calls[block.module] += 1
        current = now.get(key)
        if current is not None and str(current.tokens) != str(block.tokens):
            row.tokens = (_show(block.tokens), _show(current.tokens))
            row.note = "only these rows are read"
        elif current is not None and current.anchor in reduced.lengths:  # it runs behind a cut
            lengths = reduced.lengths[current.anchor]
            row.tokens = (_show(lengths[len(lengths) - 2]),) * 2
        if key in acted:
            applied = acted[key]
            row.method, row.tokens = str(applied.method), (_show(applied.place.tokens), _show(applied.after))
            row.note = applied.note
        elif key in returned:
            method, before, after = returned[key]
            row.method, row.tokens = str(method), (_show(before), _show(after))
            row.note = "the tokens that were dropped are back"
        elif key in refused:
            method, refusal = refused[key]
            row.method, row.refusal = str(method), refusal
        elif block.refusal is not None:
            row.refusal = block.refusal
        rows.append(row)
    return rows


def _show_rewritten(row: BlockReport, key: tuple[str, int, str], rewritten: Any, reduced: Any) -> None:
    """What became of an attention that a method was to compute, beside what became of its tokens."""
    cut = any(_identity(block) == key for block in reduced.applied)
    for block, (method, note) in rewritten.applied.items():
        if _identity(block) == key:
            row.method, row.refusal = f"{row.method} + {method}" if cut else str(method), None
            row.note = "; ".join(part for part in (row.note, note) if part)
    for block, (method, refusal) in rewritten.refused.items():
        if _identity(block) == key and cut:
            row.note += f"; {method.name} refused: {refusal.reason}"
        elif _identity(block) == key and row.method is None:
            row.method, row.refusal = str(method), refusal


def _show_sparse(rows: list[BlockReport], sparse: Any) -> None:
    """What is left out of a block's weights, beside what became of its tokens."""
    by_place = {(str(row.kind), row.layer, row.module): row for row in rows}
    for found, refused in ((sparse.applied, False), (sparse.refused, True)):
        for block, (method, said) in found.items():
            kind = "mlp" if isinstance(block, Mlp) else "attention"
            row = by_place.get((kind, block.layer, block.module))
            if row is None:  # experts, which no exact pass and no method for tokens knows
                row = BlockReport(
                    "mlp", block.layer, block.module, (_show(block.tokens),) * 2, block.form, block.source
                )
                rows.append(row)
            if not refused:
                row.method = str(method) if row.method is None or row.refusal else f"{row.method} + {method}"
                row.note, row.refusal = "; ".join(part for part in (row.note, said) if part), None
            elif row.method is None:
                row.method, row.refusal = str(method), said
            else:
                row.note = "; ".join(part for part in (row.note, f"{method.name} refused: {said.reason}") if part)


def _mlp_row(mlp: Mlp, costs: Costs) -> BlockReport:
    """An MLP runs on as many tokens as what its last linear became does."""
    row = BlockReport("mlp", mlp.layer, mlp.module, (_show(mlp.tokens),) * 2, mlp.form, mlp.source)
    row.flops = costs.nodes(mlp.products)
    new = costs.became(mlp.down)
    if new is not None:
        row.tokens = (row.tokens[0], _rescaled(mlp.tokens, _rows(mlp.down, mlp), _rows(new, mlp)))
    return row


def _rows(node: fx.Node, mlp: Mlp) -> Any:
    """The size of the dimensions that hold the tokens; samples may share them."""
    meta = tensor_meta(node)
    assert meta is not None
    return sympy.Mul(*(_expression(meta.shape[dim]) for dim in mlp.token_dims))


def _rescaled(tokens: Any, before: Any, after: Any) -> int | str:
    now = sympy.cancel(_expression(tokens) * after / before)
    return int(now) if now.is_Integer else str(now)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _identity(block: Attention) -> tuple[str, int, str]:
    return (block.module or module_path(block.anchor), block.layer, block.form)


def _show(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)
