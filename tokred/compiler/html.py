"""The HTML report: one self-contained file with blocks before and after, refusals, token pictures and graph text."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from tokred.compiler.page import details, page
from tokred.compiler.picture import figures
from tokred.compiler.report import BlockReport, GraphReport, PassReport, Report
from tokred.compiler.text import acted_on, change_text, flops_text, graph_refusals, method_text, saving_text

__all__ = ["write_html"]

COLUMNS = ("layer", "kind", "form", "module", "tokens", "FLOPs", "method")


def write_html(report: Report, path: Path) -> Path:
    """Write the report to `path`, making its folder if need be, and return the path."""
    graphs = [_graph(graph, number) for number, graph in enumerate(report.graphs, start=1)]
    body = '<button class="all">open all</button>' + "".join(graphs) if graphs else "<p>Nothing was compiled yet.</p>"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page("tokred report", body), encoding="utf-8")
    return path


def _graph(graph: GraphReport, number: int) -> str:
    return (
        f'<section class="graph" id="graph-{number}"><h2>graph {number}: {escape(graph.model)}</h2>'
        + f'<p class="summary">{escape(_summary(graph))}</p>'
        + _blocks(graph.blocks)
        + _titled("tokens", figures(graph, f"graph-{number}"))
        + _titled("refused", _refused(graph))
        + _titled("restored to all tokens", _list(graph.restores, "restores"))
        + _titled("passes", _passes(graph.passes))
        + _titled("notes", _list(graph.notes, "notes"))
        + _titled("graph", _texts(graph))
        + "</section>"
    )


def _summary(graph: GraphReport) -> str:
    acted = sum(acted_on(block) for block in graph.blocks)
    refused = sum(block.refusal is not None for block in graph.blocks)
    counts = f"{len(graph.blocks)} blocks, {acted} acted on, {refused} refused"
    if not graph.flops[0]:
        return counts
    return f"{counts}. FLOPs {_change(*map(flops_text, graph.flops))} ({saving_text(graph.flops)})"


def _change(before: object, after: object) -> str:
    return change_text(before, after, arrow="→")


def _titled(title: str, content: str) -> str:
    return f"<h3>{escape(title)}</h3>{content}" if content else ""


def _blocks(blocks: list[BlockReport]) -> str:
    if not blocks:
        return ""
    longest = max((count for block in blocks for count in block.tokens if isinstance(count, int)), default=1)
    return f'<table class="blocks">{_head(COLUMNS)}{"".join(_block(block, longest) for block in blocks)}</table>'


def _block(block: BlockReport, longest: int) -> str:
    flops = _change(*map(flops_text, block.flops))
    kind = "refused" if block.refusal else "acted" if acted_on(block) else "untouched"
    note = f'<div class="dim">{escape(block.note)}</div>' if block.note else ""
    source = f'<div class="dim">{escape(block.source)}</div>' if block.source else ""
    return (
        f'<tr class="block {kind}"><td>{block.layer}</td><td>{escape(block.kind)}</td><td>{escape(block.form)}</td>'
        f"<td><code>{escape(block.module)}</code>{source}</td>"
        f'<td class="tokens">{escape(_change(*block.tokens))}{_bars(block, longest)}</td>'
        f'<td class="nowrap">{flops}</td><td><span class="what">{escape(method_text(block))}</span>{note}</td></tr>'
    )


def _bars(block: BlockReport, longest: int) -> str:
    """Two bars on one scale for the whole graph; none where a length is symbolic."""
    return "".join(
        f'<span class="bar {kind}" style="width:{100 * count / max(longest, 1):.1f}%"></span>'
        for kind, count in zip(("before", "after"), block.tokens, strict=True)
        if isinstance(count, int)
    )


def _refused(graph: GraphReport) -> str:
    rows = [
        f'<tr class="refusal"><td>{escape(who)}</td><td><code>{escape(refusal.code)}</code></td>'
        f"<td>{escape(refusal.reason)}</td><td><code>{escape(refusal.where)}</code></td></tr>"
        for who, refusal in graph_refusals(graph)
    ]
    return (
        f'<table class="refusals">{_head(("what", "code", "reason", "where"))}{"".join(rows)}</table>' if rows else ""
    )


def _passes(passes: list[PassReport]) -> str:
    rows = [
        f'<tr class="pass"><td>{escape(each.name)}</td><td class="{_promise(each)}">{_promise(each)}</td>'
        f"<td>{each.changes}</td><td>{each.seconds:.3f}</td><td>{'<br>'.join(map(escape, each.lines))}</td></tr>"
        for each in passes
    ]
    return (
        f'<table class="passes">{_head(("pass", "", "changes", "seconds", ""))}{"".join(rows)}</table>' if rows else ""
    )


def _promise(each: PassReport) -> str:
    return "exact" if each.exact else "lossy"


def _texts(graph: GraphReport) -> str:
    parts = (("captured graph", graph.before), ("rewritten graph", graph.after))
    return "".join(details(title, text) for title, text in parts if text)


def _list(lines: list[str], kind: str) -> str:
    return f'<ul class="{kind}">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def _head(columns: Iterable[str]) -> str:
    return f"<thead><tr>{''.join(f'<th>{escape(column)}</th>' for column in columns)}</tr></thead>"
