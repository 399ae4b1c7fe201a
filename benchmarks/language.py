"""Write docs/language.md: python -m benchmarks.language [--run] [--speed] [--again] [--only TEXT]

`--run` scores each row of `tokred.demo.language.table`, `--speed` times those for neurons too, and each line goes to
benchmarks/results/language.json at once: stopped and called again, it goes on where it was. With `--again` what is
named, `--run` or `--speed`, is measured once more (on a quieter machine, say). With neither, the page is rendered from
the file.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.mosaic import measured_on, parsed
from tests.zoo.torchvision_shim import install
from tokred.demo.language import model, recall, table
from tokred.demo.language.data import corpus, windows

HERE = Path(__file__).parent
PAGE, FILE = HERE.parent / "docs" / "language.md", HERE / "results" / "language.json"
SAMPLES, SEED = 200, 2  # sequences of pairs, 1600 questions
ROUNDS = 11

INTRODUCTION = """\
# A language model with real perplexity, and recall

Written by `python -m benchmarks.language`; do not edit.

Two tasks, both trained here without any sparsity, nothing downloaded.

*Perplexity*, per token, is that of `tokred.demo.language`: a Llama of transformers' own class, {layers} layers of width
{width} with {neurons} neurons each, {size:.1f} MB in float16, trained on the source of Python's standard library. Here
{windows} windows of {window} tokens of files that training never saw (by file name; a file may resemble another). The
second model's gate is ReLU instead of SiLU; it was trained on from the first one's weights. Both are small and were
trained for minutes: their neurons need not be as sparse as a large model's.

*Recall* is multi-query associative recall (Zoology, arXiv 2312.04927): {pairs} pairs of a key and a value among filler
in a context of {context} tokens, then each key once, and the value behind it is to be said. A Llama of two layers,
{samples} sequences, {questions} questions; the standard error is at most {error:.1f} points.

- **asked**: per cent to leave out, of an MLP's neurons for each token, or of the context's tokens.
- **left out**: per cent of products of a neuron and a token that the MLPs' last linear layers did not need to compute,
  counted while the recipe ran: the neuron was exactly zero, or the token was gone (`teal` thins other linears too). In
  the text where there is a perplexity, else in the recall task, whose questions are never dropped.
- **tokens/s**: `generate()` of {words} tokens behind {prompt}, batch 1, and how many times as many as with
  `backend="inductor"`, median of {rounds} interleaved calls. This model's weights fit into the processor's caches,
  where skipping them saves little: `benchmarks/decode.py` is about speed. Empty: not measured.
- Rows *by hand* are hooks in the model as it is, not tokred: what a method should beat (random neurons), and what it
  could at best reach (each token's largest). `core_neurons` chooses for eight windows at once, in all layers.
- Methods that drop or merge tokens have no perplexity: which tokens stay is chosen with the whole text in sight, and
  dropped ones predict nothing. They cut between the two layers, `zoo_prune` in front of both.
  `token_sparse_attention` leaves tokens out of the second layer's attention alone; what it was asked is `coverage`.

What the table of 2026-11-23 shows. Which neurons are left out matters: half of them by the size of their gate (`cats`)
cost 0.5 % of perplexity, at random they double it. `teal` leaves out half of what every linear reads, attention's too,
and that costs this model 17 %, with shares allocated greedily 9 %: more than the few percent that its paper reports of
large models (at 30 % it is 1 %). Blocks of neurons (`moefy`, 45 % at a half) and one set for a whole text
(`core_neurons`, 76 %) beat random neurons, and no more can be said for them here: neither was made for small models
with SiLU that were not trained for it. The ReLU model's gates are zero for 56 % of all neurons without being asked.
Recall says nothing about an MLP's neurons: this task needs attention alone, 90 % of the neurons, chosen at random, can
go. `teal`, which thins attention's inputs as well, loses it from 70 % on; with greedy shares, which spare attention,
most of it stays at 90 %. Recall also tells methods for tokens apart. `norm` loses nothing as long as 30 % of the
context are kept (in front of the cut keys have a norm of 9.6 on average, values of 13.4, filler of 6.8; in 10 % there
is room for four values of eight). Neighbours merged by `pool` are still told apart at 50 %. `fastv` and `corematching`
choose by what the last token looks at, which here is one question of eight or filler; they are made for prompts that
end with their question. No method for neurons makes a model of width 128 faster (0.6 to 1.1 times Inductor: a token
takes 3 ms, little of which is reading weights); at width 1024 `cats` and `teal` do, see benchmarks/RESULTS.md.
"""


def render(found: dict[str, Any]) -> str:
    rows = [row for row in table.recipes() if row.key in found]
    text = INTRODUCTION.format(
        layers=model.CONFIG["num_hidden_layers"],
        width=model.CONFIG["hidden_size"],
        neurons=model.CONFIG["intermediate_size"],
        size=model.checkpoint().stat().st_size / 1e6,
        windows=table.SAMPLE,
        window=model.WINDOW,
        pairs=recall.PAIRS,
        context=recall.CONTEXT,
        samples=SAMPLES,
        questions=SAMPLES * recall.PAIRS,
        error=100 * 0.5 / (SAMPLES * recall.PAIRS) ** 0.5,
        words=table.WORDS,
        prompt=table.PROMPT,
        rounds=ROUNDS,
    )
    lines = ["| asked | model | recipe |" + "".join(f" {heading} |" for heading in table.HEADINGS)]
    lines.append("|---:|---|---|" + "---:|" * len(table.HEADINGS))
    for row in rows:
        measured = table.Row(**found[row.key]["row"])
        cells = "".join(f" {cell} |" for cell in table.cells(measured))
        lines.append(f"| {row.level} % | {row.activation} | `{row.recipe}` |{cells}")
    sections = [text, "\n".join(lines)]
    for kind in ("run", "speed"):
        if machines := [found[row.key][kind] for row in rows if kind in found[row.key]]:
            sections.append(measured_on(kind, machines).replace("Accuracy", "Scores"))
    return "\n".join(sections) + "\n"


def main(arguments: list[str] | None = None) -> int:
    install()
    options = parsed(arguments, "language", "perplexity, recall and what is left out,")
    found: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    kinds = ["run", "speed"] if options.speed else ["run"] if options.run else []  # a line needs its scores first
    if kinds:
        models = {name: model.load(name) for name in model.ACTIVATIONS} | {"recall": recall.load()}
        tokens, data = corpus(held_out=True).tokens(), recall.pairs(SAMPLES, SEED)
        prompt = windows(tokens, 1, table.PROMPT - 1)
    for kind in kinds:
        for plain in table.recipes():
            known = found.get(plain.key, {})
            again = options.again and getattr(options, kind)
            timed = plain.method in table.NEURONS or plain.method == "dense"
            if options.only not in plain.recipe or (kind in known and not again) or (kind == "speed" and not timed):
                continue
            row = table.Row(**known["row"]) if "row" in known else plain
            machine = describe() | {"held-out text": corpus(held_out=True).digest}
            if kind == "run":
                row = table.score(models, tokens, data, row)
            else:
                row = table.time_against_dense(models[row.activation], prompt, row, ROUNDS)
            found[plain.key] = known | {"row": asdict(row), kind: machine}
            FILE.write_text(json.dumps(found, indent=2) + "\n")
            print(plain.key, *table.cells(row), flush=True)
    PAGE.write_text(render(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
