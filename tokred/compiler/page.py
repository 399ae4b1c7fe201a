"""The frame of every HTML file that tokred writes: one file, nothing fetched, readable in light and dark."""

from __future__ import annotations

from html import escape

__all__ = ["details", "page"]

# The policy makes "nothing fetched" a promise that the browser keeps, whatever text a model's source brings in.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --dim: #667085; --line: #d5dae3; --ground: #ffffff; --panel: #f5f7fa;
  --before: #b9c2d0; --after: #2f6fdb; --refused: #b54708; --exact: #18794e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --dim: #98a2b3; --line: #343c49; --ground: #14181f;
  --panel: #1c222c; --before: #4a5566; --after: #6ea0ff; --refused: #f79009; --exact: #4cc38a; } }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--dim); }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
code, pre { font: 13px/1.45 ui-monospace, monospace; } td code { overflow-wrap: anywhere; }
pre { background: var(--panel); padding: .8rem; overflow: auto; max-height: 36rem; margin: .4rem 0; }
summary { cursor: pointer; padding: .2rem 0; } .dim { color: var(--dim); } .nowrap { white-space: nowrap; }
.bar { display: block; height: .45rem; min-width: 1px; border-radius: 2px; margin: .15rem 0; }
.bar.before { background: var(--before); } .bar.after { background: var(--after); } .tokens { min-width: 9rem; }
tr.refused .what { color: var(--refused); } tr.acted .what { font-weight: 600; } .exact { color: var(--exact); }
button { font: inherit; padding: .15rem .7rem; border: 1px solid var(--line); border-radius: 4px;
  background: var(--panel); color: inherit; cursor: pointer; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.2rem; } figure { margin: 0; width: 14rem; }
figcaption { font-size: .9rem; }
.picture { width: 100%; height: auto; display: block; background: var(--panel); }
.picture image { image-rendering: pixelated; } .cell { stroke: #0000; stroke-width: .02; }
.cell.kept { fill: #0000; } .cell.kept.plain { fill: var(--before); }
.cell.lit { stroke: #ff2d55; stroke-width: .14; } .edge { fill: none; stroke: #fff; stroke-width: .07; }
.flow { overflow: auto; max-height: 80vh; border: 1px solid var(--line); background: #fff; }
"""

SCRIPT = """
for (const button of document.querySelectorAll('button.all')) {
  button.addEventListener('click', () => {
    const all = [...document.querySelectorAll('details')];
    const open = all.some(one => !one.open);
    for (const one of all) one.open = open;
    button.textContent = open ? 'close all' : 'open all';
  });
}
for (const picture of document.querySelectorAll('svg.picture')) {
  const light = (event, on) => {
    const group = event.target.dataset && event.target.dataset.group;
    if (group === undefined || group === '-1') return;
    for (const cell of picture.querySelectorAll(`[data-group="${group}"]`)) cell.classList.toggle('lit', on);
  };
  picture.addEventListener('mouseover', event => light(event, true));
  picture.addEventListener('mouseout', event => light(event, false));
}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document around `body`, which is HTML already; `title` is text."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
<script>{SCRIPT}</script>
</body>
</html>
"""


def details(summary: str, text: str) -> str:
    """A closed section that opens to a long text, both given as text."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
