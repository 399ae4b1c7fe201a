"""What compiling costs: python -m benchmarks.compile_time [--model deit_small] [--repeats 3] [--json out]

Every number is the first call of a fresh process (tracing, passes, code generation, g++), with imports done before.
`cold` starts with an empty TORCHINDUCTOR_CACHE_DIR, `warm` is a second process with the same folder. `handwritten`
is the hand-written ToMe under backend="inductor", `default` the unmodified model under backend="tokred", same r.
tokred's own time is the first call with lower="eager" minus that of backend="eager", where nothing is generated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import handwritten
from benchmarks.compare import Forward
from benchmarks.machine import describe
from benchmarks.models import MODELS, build, pixels, rebuild

CACHED = ("inductor", "handwritten", "default")
UNCACHED = ("backend_eager", "lower_eager")


def make(variant: str, name: str, r: int) -> Forward:
    model, recipe = build(name), f"tome(r={r})"
    if variant == "handwritten":
        return torch.compile(rebuild(name, model, handwritten.ToMe, r=[r] * MODELS[name].depth))
    if variant in ("inductor", "backend_eager"):
        return torch.compile(model, backend="inductor" if variant == "inductor" else "eager")
    lower = "eager" if variant == "lower_eager" else "inductor"
    return torch.compile(model, backend="tokred", options={"recipe": recipe, "lower": lower})


def child(variant: str, name: str, batch: int, r: int) -> dict[str, float]:
    """Runs in a process of its own: seconds of the first call, and of the passes as tokred's report counts them."""
    if variant in ("default", "lower_eager"):
        import tokred
    compiled, x = make(variant, name, r), pixels(name, batch, torch.float32)
    with torch.no_grad():
        start = time.perf_counter()
        compiled(x)
        seconds = {"first_call": time.perf_counter() - start}
    if variant in ("default", "lower_eager"):
        graphs = tokred.reports().graphs
        seconds["passes_reported"] = sum(done.seconds for graph in graphs for done in graph.passes)
    return seconds


def spawn(variant: str, options: argparse.Namespace, cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.compile_time", "--child", variant, "--model", options.model]
    command += ["--batch", str(options.batch), "--r", str(options.r)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the repeats; the variants take turns."""
    samples: dict[str, list[float]] = {}
    for turn in range(options.repeats):
        for variant in (*UNCACHED, *CACHED)[:: -1 if turn % 2 else 1]:
            with tempfile.TemporaryDirectory() as cache:
                cold = spawn(variant, options, cache)
                samples.setdefault(f"{variant} cold", []).append(cold["first_call"])
                if variant in CACHED:
                    samples.setdefault(f"{variant} warm", []).append(spawn(variant, options, cache)["first_call"])
                if "passes_reported" in cold:
                    samples.setdefault(f"{variant} passes reported", []).append(cold["passes_reported"])
            print(f"  {turn + 1}/{options.repeats} {variant}: {cold}", flush=True)
    seconds = {name: median(values) for name, values in samples.items()}
    return {
        "model": options.model,
        "batch": options.batch,
        "r": options.r,
        "machine": describe(),
        "samples": samples,
        "seconds": seconds,
        "tokred_seconds": seconds["lower_eager cold"] - seconds["backend_eager cold"],
        "cold_ratio": seconds["default cold"] / seconds["handwritten cold"],
        "warm_speedup": seconds["default cold"] / seconds["default warm"],
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{name:32s}{seconds:8.2f} s" for name, seconds in result["seconds"].items()]
    lines.append(f"tokred's own time                {result['tokred_seconds']:.2f} s")
    lines.append(f"cold: default / handwritten      {result['cold_ratio']:.2f}")
    lines.append(f"default: cold / warm             {result['warm_speedup']:.2f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_time", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", choices=list(MODELS), default="deit_small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--r", type=int, default=13)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=[*CACHED, *UNCACHED], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(child(options.child, options.model, options.batch, options.r)))
        return
    result = measure(options)
    print(table(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
