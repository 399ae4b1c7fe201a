"""Regenerates the zoo's table: `python -m tests.zoo.table --update` writes tests/zoo/TABLE.json and docs/zoo.md.

    --only GLOB      some architectures (comma-separated globs); with --update the other rows stay as they are
    --lower NAME     how the recipe is lowered: inductor (default), aot_eager, eager
    --recipe RECIPE  one recipe for all, instead of the one that suits each
    --update         write the files; without it the rows are only printed

The exact passes are measured in float64 through aot_eager, the recipe in float32 through --lower. Seconds per
architecture go to out/zoo_times.json. Exit status 1 when a row holds a wrong result or an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tests.zoo.architectures import ARCHITECTURES

__all__ = ["PAGE", "TABLE", "load_table", "main", "render"]

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("TABLE.json")
PAGE = ROOT / "docs" / "zoo.md"
TIMES = ROOT / "out" / "zoo_times.json"

_HEAD = """# The zoo

Real architectures from transformers, timm, diffusers and torch.nn, small and with random weights, and what tokred does
with each. Made by `python -m tests.zoo.table --update`; the tests compare every run with it, so a change in a count is
a failing test.

- **attention**, **MLP**: blocks in the report, of those that a reader of the model's source code counts.
- **exact**: a bound on the relative difference of the exact passes from eager PyTorch, in float64 (float32 where the
  model has no float64).
- **recipe**, **tokens**: what ran, through `lower={lower}`, and the token count before and after each site it reduced.
- **refused**: reason codes of the sites that were left alone. **restored**: places that needed every token back.

{totals}

| architecture | why it is here | graphs | attention | MLP | exact | recipe | tokens | refused | restored |
|---|---|---|---|---|---|---|---|---|---|
"""


def load_table() -> dict[str, dict[str, Any]]:
    """The checked-in rows, by architecture."""
    rows: dict[str, dict[str, Any]] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    return rows


def render(rows: dict[str, dict[str, Any]]) -> str:
    """The table as a Markdown page."""
    lowers = sorted({row["lower"] for row in rows.values()})
    head = _HEAD.format(lower=" or ".join(lowers), totals=_totals(rows))
    return head + "".join(_line(name, row) + "\n" for name, row in rows.items())


def _totals(rows: dict[str, dict[str, Any]]) -> str:
    attention, of = (sum(row["attention"][i] for row in rows.values()) for i in (0, 1))
    mlp, mlp_of = (sum(row["mlp"][i] for row in rows.values()) for i in (0, 1))
    reduced = [row["lower"] for row in rows.values() if row["reduced"] and row["lossy"] == "ok"]
    through = reduced.count("inductor")
    return (
        f"{len(rows)} architectures: {attention} attention blocks found of {of}, {mlp} MLP blocks of {mlp_of}; "
        f"the recipe reduced tokens in {len(reduced)} architectures, {through} of them through Inductor."
    )


def _line(name: str, row: dict[str, Any]) -> str:
    cells = [
        name,
        ARCHITECTURES[name].why if name in ARCHITECTURES else "",
        row["graphs"],
        "{}/{}".format(*row["attention"]),
        "{}/{}".format(*row["mlp"]),
        row["exact"],
        f"`{row['recipe']}`",
        _tokens(row),
        ", ".join(f"{code} x{count}" for code, count in row["refusals"].items()),
        "; ".join(row["restored"][:2]) + (f" and {len(row['restored']) - 2} more" if len(row["restored"]) > 2 else ""),
    ]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _tokens(row: dict[str, Any]) -> str:
    if row["lossy"] != "ok":
        return str(row["lossy"])
    return ", ".join(f"{before}→{after}" for before, after in row["reduced"]) or "none reduced"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lower", choices=("inductor", "aot_eager", "eager"), default="inductor")
    parser.add_argument("--only", default="*")
    parser.add_argument("--recipe")
    parser.add_argument("--update", action="store_true")
    options = parser.parse_args(arguments)

    names = [name for name in ARCHITECTURES if any(fnmatch(name, glob) for glob in options.only.split(","))]
    if not names:
        parser.error(f"no architecture is called {options.only!r}; known: {', '.join(ARCHITECTURES)}")
    return _run(names, options.lower, options.recipe, options.update)


def _run(names: list[str], lower: str, recipe: str | None, update: bool) -> int:
    from tests.zoo.measure import measure  # late: `--help` and `render` need no tokred

    known, times, bad = load_table(), _load_times(), []
    for number, name in enumerate(names, 1):
        row, seconds = measure(ARCHITECTURES[name], lower, recipe)
        known[name], times[name] = row.to_json(), seconds
        if not (row.lossy == "ok" and row.exact and "WRONG" not in row.exact and "ERROR" not in row.exact):
            bad.append(name)
        print(f"{number:3d}/{len(names)} {sum(seconds.values()):6.1f} s  {_line(name, known[name])}", flush=True)
        _save(known, times, update)
    print(f"{len(names) - len(bad)} of {len(names)} rows are right" + (f"; not: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


def _load_times() -> dict[str, dict[str, float]]:
    times: dict[str, dict[str, float]] = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    return times


def _save(rows: dict[str, dict[str, Any]], times: dict[str, dict[str, float]], update: bool) -> None:
    """After every row, so that an interrupted run loses one."""
    TIMES.parent.mkdir(exist_ok=True)
    TIMES.write_text(json.dumps(times, indent=1) + "\n")
    if not update:
        return
    ordered = {name: rows[name] for name in ARCHITECTURES if name in rows}  # a row whose architecture is gone goes too
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}" for name, row in ordered.items())
    TABLE.write_text("{\n" + lines + "\n}\n")
    PAGE.write_text(render(ordered))


if __name__ == "__main__":
    sys.exit(main())
