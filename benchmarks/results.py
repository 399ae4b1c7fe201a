"""Write benchmarks/RESULTS.md from measured JSON: python -m benchmarks.results [--run all | --run NAME ...]

`--run` measures the named configurations first (each in its own process) into benchmarks/results/NAME.json;
without it the table is rendered from the files that are there. Every number comes with where and when it was measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import tokred

HERE = Path(__file__).parent
FOLDER = HERE / "results"

CONFIGURATIONS = {
    "deit_small_b8_r13": ["--model", "deit_small", "--batch", "8", "--r", "13"],
    "deit_small_b8_r8": ["--model", "deit_small", "--batch", "8", "--r", "8"],
    "vit_small_b8_r13": ["--model", "vit_small", "--batch", "8", "--r", "13"],
    "vit_base_b8_r13": ["--model", "vit_base", "--batch", "8", "--r", "13"],
    "deit_small_b8_r13_bfloat16": ["--model", "deit_small", "--batch", "8", "--r", "13", "--dtype", "bfloat16"],
    "deit_small_b1_r13": ["--model", "deit_small", "--batch", "1", "--r", "13"],
}
FASTV, TODRE = "fastv(layer=2, keep=0.5)", "todre(keep=0.1)"
DECODERS = {
    "decoder_fastv": ["--recipe", FASTV],
    "decoder_fastv_b4": ["--recipe", FASTV, "--batch", "4"],
    "decoder_fastv_bfloat16": ["--recipe", FASTV, "--dtype", "bfloat16"],
    "decoder_pyramiddrop": ["--recipe", "pyramiddrop()"],
    "decoder_pyramiddrop_bfloat16": ["--recipe", "pyramiddrop()", "--dtype", "bfloat16"],
    "decoder_todre": ["--recipe", TODRE],
    "decoder_todre_bfloat16": ["--recipe", TODRE, "--dtype", "bfloat16"],
    "decoder_last_logits": ["--layers", "12"],
    "decoder_last_logits_whole": ["--layers", "12", "--whole"],
}
COMPILE_TIME = "compile_time"
PADDING = "minilm_padding"
TOKEN_SPARSE = "token_sparse"
SPARSE_MLP = "sparse_mlp"
DECODES = {
    "decode_cats": "cats(sparsity=0.5)",
    "decode_teal": "teal(sparsity=0.5)",
    "decode_core_neurons": "core_neurons(keep=0.4)",
}

INTRODUCTION = """\
# Results

Written by `python -m benchmarks.results`; do not edit. `benchmarks/compare.py` says what the variants are (of padded
batches: `benchmarks/padding.py`). Times are
medians, ratios are medians of the quotients within a round: above 1 means faster than the column's base. `ideal` is a
hand-written model with the same token counts whose reduction is a slice; `handwritten` is a hand-written ToMe; both run
under `backend="inductor"`. `exact` is `backend="tokred"` without a recipe, `tome` is `tome(r)` with `exact=False`,
`default` is `tome(r)` with the default options.

Of decoders (`benchmarks/decoder.py`): `ideal` is the model's own layers with the recipe's token counts, a slice for a
cut and one row in the last layer, `free` the recipe without its choice (the first rows stay), `method` the recipe. What
choosing costs is what `method` takes beyond `free`.
"""


def decoders() -> dict[str, list[str]]:
    """Those whose method is registered."""
    known = tokred.methods()
    return {
        name: given for name, given in DECODERS.items() if given[0] != "--recipe" or given[1].split("(")[0] in known
    }


def run(name: str, rounds: int) -> str | None:
    """Measure one configuration in its own process; the end of its output if that fails."""
    target = ["--json", str(FOLDER / f"{name}.json")]
    if name == COMPILE_TIME:
        command = [sys.executable, "-m", "benchmarks.compile_time", *target]
    elif name == PADDING:
        command = [sys.executable, "-m", "benchmarks.padding", "--rounds", str(rounds), *target]
    elif name == TOKEN_SPARSE:  # seconds a call at 16K, so few rounds
        command = [sys.executable, "-m", "benchmarks.token_sparse", "--rounds", str(min(rounds, 5)), *target]
    elif name == SPARSE_MLP:
        given = ["--tokens", "1", "--threads", "2", "--rounds", str(rounds)]
        command = [sys.executable, "-m", "benchmarks.sparse_mlp", *given, *target]
    elif name in DECODES:  # seconds a call
        given = ["--recipe", DECODES[name], "--rounds", str(min(rounds, 5))]
        command = [sys.executable, "-m", "benchmarks.decode", *given, *target]
    else:
        module, each = ("compare", CONFIGURATIONS) if name in CONFIGURATIONS else ("decoder", DECODERS)
        command = [sys.executable, "-m", f"benchmarks.{module}", *each[name], "--rounds", str(rounds), *target]
    print(" ".join(command), flush=True)
    done = subprocess.run(command, cwd=HERE.parent, stderr=subprocess.PIPE, text=True)  # what it prints shows at once
    return None if done.returncode == 0 else done.stderr[-2000:]


def render() -> str:
    sections = [INTRODUCTION]
    for name in CONFIGURATIONS | decoders():
        path = FOLDER / f"{name}.json"
        title = f"## {name}\n\n"
        sections.append(title + (comparison(json.loads(path.read_text())) if path.exists() else "Not measured yet.\n"))
    last = {"Padding": (PADDING, padding), "Long prompts": (TOKEN_SPARSE, token_sparse)}
    last |= {"Active neurons alone": (SPARSE_MLP, sparse_mlp)}
    last |= {f"Decoding with {recipe}": (name, decode) for name, recipe in DECODES.items()}
    for title, (name, text) in {**last, "Compile time": (COMPILE_TIME, compile_time)}.items():
        path = FOLDER / f"{name}.json"
        measured = text(json.loads(path.read_text())) if path.exists() else "Not measured yet.\n"
        sections.append(f"## {title}\n\n{measured}")
    return "\n".join(sections)


def comparison(result: dict[str, Any]) -> str:
    what = result.get("recipe") or f"r={result['r']}"
    setting = f"{result['model']}, batch {result['batch']}, {what}, {result['dtype']}"
    return _measured(result, setting, "logit")


def padding(result: dict[str, Any]) -> str:
    """`benchmarks/padding.py` says what the variants are; `ideal` and `full` run on other batches than the rest."""
    return _measured(result, f"{result['model']}, batch {result['batch']}, {result['dtype']}", "number")


def _measured(result: dict[str, Any], setting: str, largest: str) -> str:
    bases = list(next(iter(result["speedup"].values())))
    lines = ["| variant | ms | first call s |" + "".join(f" x {base} |" for base in bases)]
    lines.append("|---|---:|---:|" + "---:|" * len(bases))
    for name, ratios in result["speedup"].items():
        cells = "".join(f" {ratios[base]:.3f} |" for base in bases)
        lines.append(f"| {name} | {1e3 * result['median'][name]:.1f} | {result['first_call'][name]:.1f} |{cells}")
    checks = [f"- {check}: {worst:.1e}" for check, worst in result["checks"].items()]
    rounds = len(next(iter(result["seconds"].values())))
    last = f"Checked first (relative to the largest {largest}):"
    heading = f"{setting}, {rounds} rounds."
    if result.get("selection") is not None:
        heading += f" Choosing takes {100 * result['selection']:.1f} % of the prefill."
    return "\n".join([heading, "", *lines, "", last, "", *checks, "", header(result)])


def token_sparse(result: dict[str, Any]) -> str:
    """`benchmarks/token_sparse.py` says what the inputs are."""
    given = result["options"]
    shape = f"{given['heads']} heads on {given['groups']} key heads of {given['width']} channels"
    lines = [
        f"token_sparse_attention, {shape}, batch 1, {given['dtype']}, {given['rounds']} rounds, against dense SDPA."
    ]
    lines += ["`attend` is the share of the tokens that a head attends to, `mass` what they hold of the last queries'"]
    lines += ["probability; `predicted` is what the cost model says is saved, without having seen the input.", ""]
    lines += ["| input | tokens | dense ms | sparse ms | attend | mass | saved ms | predicted | x dense | grouped |"]
    lines += ["|---|" + "---:|" * 9]
    for each in result["results"]:
        dense, sparse = (1e3 * median(each["seconds"][name]) for name in ("dense", "sparse"))
        realised, faster, predicted = each["realised"]["sparse"], each["speedup"], each["predicted"]
        saved = 1e3 * (predicted["saves"] - predicted["costs"])
        lines.append(
            f"| {each['kind']} | {each['tokens']} | {dense:.0f} | {sparse:.0f} | {realised['share']:.1%} "
            f"| {realised['mass']:.2%} | {dense - sparse:.0f} | {saved:.0f} "
            f"| {faster['sparse']:.2f} | {faster['grouped']:.2f} |"
        )
    starts = f"Predicted to pay from {result['pays_from']} tokens on; `gate=True` refuses it below."
    return "\n".join([*lines, "", starts, "", header(result)])


def sparse_mlp(result: dict[str, Any]) -> str:
    """`benchmarks/sparse_mlp.py` says what the programs are."""
    given = result["settings"]
    lines = [
        f"Products of a {given['width']} x {given['hidden']} MLP under Inductor, {given['dtype']}, one token, "
        f"{given['threads']} threads, {given['rounds']} rounds.",
        "`bound` is the quotient of the bytes of weights that the two must read.",
        "",
        "| program | zeros | dense ms | sparse ms | x dense | bound |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for each in result["results"]:
        dense, sparse = (1e3 * each["median"][name] for name in ("dense", "sparse"))
        shown = f"| {dense:.2f} | {sparse:.2f} | {each['ratio']:.2f} | {each['bound']:.2f} |"
        lines.append(f"| {each['program']} | {each['zeros']:.0%} {shown}")
    return "\n".join([*lines, "", header(result)])


def decode(result: dict[str, Any]) -> str:
    """`benchmarks/decode.py` says what the variants and workloads are."""
    given = result["options"]
    shape = f"A Llama of {given['layers']} layers, width {given['width']}, {given['dtype']}, {given['rounds']} rounds"
    columns = "`without` has no MLPs at all, so the rest is their share; `predicted` is the report's quotient of FLOPs"
    lines = [f"{shape}. Times faster than Inductor; {columns}.", ""]
    lines += ["| workload | exact | recipe | predicted | without | share of the MLPs | the MLPs' own gain |"]
    lines += ["|---|" + "---:|" * 6]
    for workload, found in result.items():
        if isinstance(found, dict) and "summary" in found:
            names = ["x inductor, exact", "x inductor, recipe", "x FLOPs, report", "x inductor, without"]
            numbers = [found["summary"].get(name) for name in [*names, "share of the MLPs", "the MLPs' own gain"]]
            cells = ("" if number is None else f"{number:.3f}" for number in numbers)
            lines.append(f"| {workload} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", header(result)])


def compile_time(result: dict[str, Any]) -> str:
    lines = ["| first call of a fresh process | s |", "|---|---:|"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in result["seconds"].items()]
    lines += [
        "",
        f"- tokred's own time for {result['model']}: {result['tokred_seconds']:.2f} s",
        f"- cold, default over handwritten: {result['cold_ratio']:.2f}",
        f"- second process with a warm cache: {result['warm_speedup']:.2f} times faster",
        "",
        header(result),
    ]
    return "\n".join(lines)


def header(result: dict[str, Any]) -> str:
    return "Machine: " + ", ".join(f"{key} {value}" for key, value in result["machine"].items()) + ".\n"


def main(arguments: list[str] | None = None) -> int:
    names = [*CONFIGURATIONS, *decoders(), PADDING, TOKEN_SPARSE, SPARSE_MLP, *DECODES, COMPILE_TIME]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", nargs="+", choices=[*names, "all"], default=[])
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args(arguments)
    wanted = names if "all" in options.run else options.run
    failures = {name: why for name in wanted if (why := run(name, options.rounds)) is not None}
    (HERE / "RESULTS.md").write_text(render())
    for name, why in failures.items():
        print(f"{name} failed:\n{why}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
