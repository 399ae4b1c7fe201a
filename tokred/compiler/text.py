"""The printed report: plain text, aligned, narrow enough for a terminal where the module names are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokred.compiler.report import BlockReport, GraphReport, PassReport, Refusal, Report

__all__ = [
    "acted_on",
    "change_text",
    "flops_text",
    "graph_refusals",
    "method_text",
    "refusal_text",
    "report_text",
    "saving_text",
]

HEADER = ("layer", "kind", "form", "module", "tokens", "FLOPs", "method")
ARROW = "->"  # plain ASCII: reports are read in log files too


def report_text(report: Report) -> str:
    """Every graph: its blocks as a table, then restores, passes, refusals with their sentences, and notes."""
    if not report.graphs:
        return "tokred: nothing was compiled yet.\n"
    total = len(report.graphs)
    return "\n".join(_graph_text(graph, number, total) for number, graph in enumerate(report.graphs, start=1))


def flops_text(flops: float) -> str:
    """A count of operations with up to three digits and a unit: 1.23G."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if flops >= 0.9995 * size:  # 999.6 M is 1 G, not 1e+03 M
            return f"{flops / size:.3g}{unit}"
    return str(round(flops))


def change_text(before: object, after: object, arrow: str = ARROW) -> str:
    """`197 -> 184`, or only `197` where nothing changed."""
    return str(before) if before == after else f"{before} {arrow} {after}"


def acted_on(block: BlockReport) -> bool:
    """Whether a method did something here; beside a refusal stands the method that was refused."""
    return block.method is not None and block.refusal is None


def method_text(block: BlockReport) -> str:
    """The method, the refusal's code, or both."""
    refused = f"refused: {block.refusal.code}" if block.refusal else ""
    return " ".join(part for part in (block.method, refused) if part)


def saving_text(flops: tuple[int, int]) -> str:
    """What was saved, in percent; what was added, with a plus sign."""
    before, after = flops
    return f"{100 * (after - before) / before:+.1f} %" if before else ""


def refusal_text(refusal: Refusal) -> str:
    """`code: sentence (where)`, one line."""
    where = f" ({refusal.where})" if refusal.where else ""
    return f"{refusal.code}: {refusal.reason}{where}"


def graph_refusals(graph: GraphReport) -> list[tuple[str, Refusal]]:
    """Everything refused in a graph with whom it was refused: blocks by name, then passes."""
    blocks = [(_block_name(block), block.refusal) for block in graph.blocks if block.refusal is not None]
    return blocks + [(each.name, refusal) for each in graph.passes for refusal in each.refusals]


def _graph_text(graph: GraphReport, number: int, total: int) -> str:
    lines = [f"graph {number} of {total}: {graph.model}", f"  {_summary(graph)}"]
    if graph.blocks:
        lines += ["", *_indent(_table([HEADER, *map(_row, graph.blocks)]))]
    lines += _section("restored to all tokens", graph.restores)
    lines += _section("passes", _pass_lines(graph.passes))
    lines += _section("refused", [f"{who}: {refusal_text(refusal)}" for who, refusal in graph_refusals(graph)])
    lines += _section("notes", graph.notes)
    return "\n".join(lines) + "\n"


def _summary(graph: GraphReport) -> str:
    attention = sum(block.kind == "attention" for block in graph.blocks)
    acted = sum(acted_on(block) for block in graph.blocks)
    refused = sum(block.refusal is not None for block in graph.blocks)
    counts = f"{attention} attention, {len(graph.blocks) - attention} MLP, {acted} acted on, {refused} refused"
    if not graph.flops[0]:
        return counts
    return f"{counts}; {change_text(*map(flops_text, graph.flops))} FLOPs ({saving_text(graph.flops)})"


def _row(block: BlockReport) -> tuple[str, ...]:
    flops = change_text(*map(flops_text, block.flops))
    what = "; ".join(part for part in (method_text(block), block.note) if part)
    return (str(block.layer), block.kind, block.form, block.module, change_text(*block.tokens), flops, what)


def _block_name(block: BlockReport) -> str:
    return f"layer {block.layer} {block.kind} {block.module}".rstrip()


def _pass_lines(passes: list[PassReport]) -> Iterator[str]:
    rows = [
        (each.name, "exact" if each.exact else "lossy", f"{each.changes} changes", f"{each.seconds:.2f} s")
        for each in passes
    ]
    for row, each in zip(_table(rows), passes, strict=True):
        yield row
        yield from _indent(each.lines)


def _section(title: str, lines: Iterable[str]) -> list[str]:
    body = list(lines)
    return ["", f"  {title}", *(f"    {line}" for line in body)] if body else []


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Left-aligned columns, two blanks apart; the last column ends where its text ends."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _indent(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]
