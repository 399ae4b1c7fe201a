"""Write docs/mosaic.md: python -m benchmarks.mosaic [--run] [--speed] [--again] [--only TEXT]

`--run` scores each recipe of `tokred.demo.mosaic.table`, `--speed` times those too, and each line goes to
benchmarks/results/mosaic.json at once: stopped and called again, it goes on where it was. With `--again` what is named,
`--run` or `--speed`, is measured once more (on a quieter machine, say). With neither, the page is rendered from the
file.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from tests.zoo.torchvision_shim import install
from tokred.demo.mosaic import table
from tokred.demo.mosaic.data import samples
from tokred.demo.mosaic.model import CHECKPOINT, load

HERE = Path(__file__).parent
PAGE, FILE = HERE.parent / "docs" / "mosaic.md", HERE / "results" / "mosaic.json"
MOSAICS, SEED = 200, 0  # 600 questions, all about held-out digits
ROUNDS = 11

INTRODUCTION = """\
# A vision-language model with real accuracy

Written by `python -m benchmarks.mosaic --speed`; do not edit. `tokred demo mosaic` prints a shorter table.

The model is `tokred.demo.mosaic`: a LLaVA of transformers' own classes, a CLIP tower of 5 layers, a projector and a
Llama of 8, {size:.1f} MB in float16, trained from scratch by `tokred/demo/mosaic/train.py` without any token reduction.
A mosaic has 5x5 cells of 8x8 pixels, about half of them empty, and is 100 image tokens; the others of a prompt are at
most 10. The mosaics here hold only scikit-learn digits that training never saw. An answer is one word, and right if it
is the most likely of all words.

- **removed**: of the image's tokens, per cent. A method with one cut removes them between layers 1 and 2 of the
  language model. One with several cuts has about as many tokens on average over the layers (so about the same cost),
  and fewer in the end. `todre`, `zoo_prune`, `catp`, `visionzip`, `aim` and `elastic_pool` act in front of layer 0: all
  layers run on what is left, which costs less than the others on the same line of per cent (see the mean).
- **{kinds}**: accuracy for each kind of question; {questions} questions, a third of each
  kind. The standard error of a kind's accuracy is at most {error:.1f} points.
- **image tokens**: what the layers' caches hold, on average over the layers and in the last.
- **FLOPs**: of the whole prefill, vision tower included, after the rewrite relative to before, from tokred's report.
- **prefill**, **end to end**: how many times faster than `backend="inductor"`; batch {batch}, the ratio of medians of
  {rounds} interleaved calls. End to end is `generate()` of {words} words. Empty: not measured.
- `random`, `norm` and `pool` are baselines, no paper claims them. They act behind layer 1's attention, a little earlier
  than `fastv`, or behind layer 0's, a little later than what acts in front of it.
- Schedules that a paper gives for a deep model are spread over these 8 layers, and nothing was tuned to this table.
  `hidrop` is for models that were trained with it, which this one was not. `todre` drops what is left in the last layer
  unless `exit=None`; its paper does so only where a threshold on attention says that it will not matter.

What the table of 2026-11-23 shows. On "which digit is at" the methods that ask what the prompt's last token looks at
(`fastv`, `pyramiddrop`, `hidrop`) beat `random` clearly; `adaptinfer` and `sparsevlm`, which ask all words of the
question, and `corematching`, which asks neurons, do not in this model. On "how many" no diversity method (`todre`,
`zoo_prune`, `catp`) beats `random`: in front of layer 0 a token that is dropped has told nobody what it saw, while
behind one or two layers the others already know. `visionzip` relies on the class token, whose attention this model
learned from an auxiliary loss only. `zoo_prune` runs the projector 128 times, which in a model as small as this costs
more than all of the rest: its FLOPs are above 2. Merging neighbours (`pool` 50 %, `aim` 50 %) loses next to nothing.
"""


def render(found: dict[str, Any]) -> str:
    rows = [row for row in table.recipes() if row.recipe in found]
    questions = 3 * MOSAICS
    text = INTRODUCTION.format(
        size=CHECKPOINT.stat().st_size / 1e6,
        kinds=", ".join(table.KINDS),
        questions=questions,
        error=100 * 0.5 / MOSAICS**0.5,
        batch=table.BATCH,
        rounds=ROUNDS,
        words=table.WORDS,
    )
    lines = ["| removed | recipe |" + "".join(f" {heading} |" for heading in table.HEADINGS)]
    lines.append("|---:|---|" + "---:|" * len(table.HEADINGS))
    for row in rows:
        measured = table.Row(**found[row.recipe]["row"])
        lines.append(f"| {row.removed} % | `{row.recipe}` |" + "".join(f" {cell} |" for cell in table.cells(measured)))
    machines = {}
    for kind in ("run", "speed"):
        for row in rows:
            if kind in found[row.recipe]:
                machines.setdefault(kind, []).append(found[row.recipe][kind])
    sections = [text, "\n".join(lines), *(measured_on(kind, each) for kind, each in machines.items())]
    return "\n".join(sections) + ("" if sections[-1].endswith("\n") else "\n")


def measured_on(kind: str, machines: list[dict[str, str]]) -> str:
    """Where and when: what all of `machines` agree on, and from where to where the rest went."""
    parts = []
    for key in machines[0]:
        values = sorted({machine[key] for machine in machines}, key=lambda value: (len(value), value))
        parts.append(f"{key} {values[0]}" if len(values) == 1 else f"{key} {values[0]} to {values[-1]}")
    what = {"run": "Accuracy", "speed": "Speed"}[kind]
    return f"\n{what} measured on: {', '.join(parts)}."


def parsed(arguments: list[str] | None, page: str, scores: str) -> argparse.Namespace:
    """What to measure anew for docs/`page`.md: its `scores`, its speed, for which recipes."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{page}", description=f"Write docs/{page}.md")
    parser.add_argument("--run", action="store_true", help=f"{scores} of each recipe")
    parser.add_argument("--speed", action="store_true", help="speed of each recipe, through Inductor")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--only", default="", metavar="TEXT", help="recipes that contain TEXT")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    install()
    options = parsed(arguments, "mosaic", "accuracy, tokens and FLOPs")
    found: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    kinds = ["run", "speed"] if options.speed else ["run"] if options.run else []  # a line needs its accuracy first
    model, data = (load(), samples(MOSAICS, SEED)) if kinds else (None, None)
    for kind in kinds:
        for plain in table.recipes():
            known = found.get(plain.recipe, {})
            again = options.again and getattr(options, kind)
            if options.only not in plain.recipe or (kind in known and not again):
                continue
            row = table.Row(**known["row"]) if "row" in known else plain
            machine = describe()
            row = table.score(model, data, row) if kind == "run" else table.time_against_dense(model, data, row, ROUNDS)
            found[plain.recipe] = known | {"row": asdict(row), kind: machine}
            FILE.write_text(json.dumps(found, indent=2) + "\n")
            print(plain.recipe, *table.cells(row), flush=True)
    PAGE.write_text(render(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
