"""Time one ViT in seven ways, interleaved in one process.

    python -m benchmarks.compare --model deit_small --batch 8 --r 13 --dtype float32

    eager           the unmodified model
    inductor        torch.compile(model, backend="inductor")
    ideal           hand-written, ToMe's token counts, a slice for a reduction; backend="inductor"
    handwritten     hand-written ToMe; backend="inductor"
    exact           backend="tokred", no recipe: the exact passes alone
    tome            backend="tokred", recipe tome(r), exact=False
    default         backend="tokred", recipe tome(r), the defaults

Each round calls every variant once, every other round backwards; a ratio is the median over rounds of the quotients
within a round, so that a slow moment of the machine cancels. All numbers are checked before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import handwritten
from benchmarks.machine import describe
from benchmarks.models import MODELS, build, pixels, rebuild

Forward = Callable[[Tensor], Tensor]

VARIANTS = ("eager", "inductor", "ideal", "handwritten", "exact", "tome", "default")
BASES = ("eager", "inductor", "ideal", "handwritten")  # what ratios refer to
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 1e-1}  # of the largest logit


@dataclass
class Result:
    """One configuration: seconds per call of every variant, first calls (they compile), and the checks made before."""

    model: str
    batch: int
    r: int
    dtype: str
    machine: dict[str, str]
    recipe: str = ""  # what is measured, where it is not tome(r)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    first_call: dict[str, float] = field(default_factory=dict)
    checks: dict[str, float] = field(default_factory=dict)

    def speedup(self, variant: str, base: str) -> float:
        """How many times faster than `base`; above 1 is faster."""
        pairs = zip(self.seconds[base], self.seconds[variant], strict=True)
        return median(slow / fast for slow, fast in pairs)

    def to_json(self) -> dict[str, Any]:
        names = list(self.seconds)
        ratios = {n: {b: self.speedup(n, b) for b in BASES if b in self.seconds} for n in names}
        medians = {name: median(self.seconds[name]) for name in names}
        return {**self.__dict__, "median": medians, "speedup": ratios, "selection": self.selection()}

    def selection(self) -> float | None:
        """The part of `method` that it takes beyond `free`, which chooses for nothing."""
        return 1 - 1 / self.speedup("free", "method") if {"free", "method"} <= set(self.seconds) else None


def inductor(model: nn.Module) -> Forward:
    return torch.compile(model, backend="inductor")


def tokred(model: nn.Module, **options: Any) -> Forward:
    return torch.compile(model, backend="tokred", options=options)


def variants(name: str, model: nn.Module, r: int) -> dict[str, Callable[[], Forward]]:
    """How to make each variant; only the wanted ones are made."""
    rates, recipe = [r] * MODELS[name].depth, f"tome(r={r})"
    return {
        "eager": lambda: model,
        "inductor": lambda: inductor(model),
        "ideal": lambda: inductor(rebuild(name, model, handwritten.Ideal, r=rates)),
        "handwritten": lambda: inductor(rebuild(name, model, handwritten.ToMe, r=rates)),
        "exact": lambda: tokred(model),
        "tome": lambda: tokred(model, recipe=recipe, exact=False),
        "default": lambda: tokred(model, recipe=recipe),
    }


def validate(name: str, r: int, result: Result, wanted: list[str]) -> None:
    """float64, eager: the hand-written model is the unmodified one, its ToMe is the oracle's and tokred's."""
    from tests.reference.timm_vit import timm_vit
    from tests.reference.tome import ToMe
    from tests.reference.vit import vit_classifier

    model, x = build(name).double(), pixels(name, 2, torch.float64)
    rates = [r] * MODELS[name].depth
    dense, tome = rebuild(name, model, handwritten.HandWritten), rebuild(name, model, handwritten.ToMe, r=rates)
    oracle = timm_vit if MODELS[name].library == "timm" else vit_classifier
    expected = oracle(getattr(model, "model", model), x, ToMe(r))["logits"]
    pairs = {
        "handwritten dense == model": (dense(x), model(x)),
        "handwritten ToMe == oracle": (tome(x), expected),
    }
    if {"exact", "tome", "default"} & set(wanted):
        recipe = f"tome(r={r})"
        pairs["tokred tome == oracle"] = tokred(model, recipe=recipe, lower="eager", exact=False)(x), expected
        pairs["tokred default == oracle"] = tokred(model, recipe=recipe, lower="eager")(x), expected
        pairs["tokred exact == model"] = tokred(model, lower="eager")(x), model(x)
    for check, (got, want) in pairs.items():
        result.checks[check] = worst = relative(got, want)
        if not worst <= 1e-9:
            raise SystemExit(f"{check}: differs by {worst:.1e} in float64 (allowed 1e-9); nothing was timed")
    torch._dynamo.reset()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


REFERENCE = {"inductor": "eager", "exact": "eager", "tome": "handwritten", "default": "handwritten"}


def warm_up(made: dict[str, Forward], x: Tensor, result: Result, reference: dict[str, str], dtype: torch.dtype) -> None:
    """Compile each variant, and compare what it gives in the measured precision with its reference."""
    answers: dict[str, Tensor] = {}
    for name, model in list(made.items()):
        start = time.perf_counter()
        answers[name] = model(x)
        result.first_call[name] = time.perf_counter() - start
        model(x)
    for name, other in reference.items():
        if name in answers and other in answers:
            result.checks[f"{name} ~ {other} ({result.dtype})"] = relative(answers[name], answers[other])
            if other == "eager" and relative(answers[name], answers[other]) > TOLERANCE[dtype]:
                raise SystemExit(f"{name} differs from {other} by {relative(answers[name], answers[other]):.1e}")


def measure(made: dict[str, Forward], x: Tensor, rounds: int, result: Result) -> None:
    names = list(made)
    result.seconds = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            made[name](x)
            result.seconds[name].append(time.perf_counter() - start)


def compare(name: str, batch: int, r: int, dtype: torch.dtype, rounds: int, wanted: list[str]) -> Result:
    result = Result(name, batch, r, str(dtype).removeprefix("torch."), describe())
    with torch.no_grad():
        validate(name, r, result, wanted)
        model, x = build(name).to(dtype), pixels(name, batch, dtype)
        made = {variant: make() for variant, make in variants(name, model, r).items() if variant in wanted}
        warm_up(made, x, result, REFERENCE, dtype)
        measure(made, x, rounds, result)
    return result


def table(result: Result) -> str:
    """Milliseconds (median, quartiles) and how many times faster than each base."""
    bases = [base for base in BASES if base in result.seconds]
    lines = [f"{'':12s}{'ms':>9s}{'quartiles':>18s}" + "".join(f"{'x ' + base:>14s}" for base in bases)]
    for name, seconds in result.seconds.items():
        low, middle, high = (1e3 * q for q in quantiles(seconds, n=4))
        speedups = "".join(f"{result.speedup(name, base):14.3f}" for base in bases)
        lines.append(f"{name:12s}{middle:9.1f}{f'{low:.1f} .. {high:.1f}':>18s}{speedups}")
    lines += [f"{check}: {worst:.1e}" for check, worst in result.checks.items()]
    return "\n".join(lines)


def report(result: Result, target: Path | None) -> None:
    """Print a result, and write all of it to a file where one is given."""
    print(table(result))
    print(", ".join(f"{key} {value}" for key, value in result.machine.items()))
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result.to_json(), indent=1))


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="deit_small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--r", type=int, default=13)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="also write everything, every sample included, to this file")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    print(
        f"{options.model}, batch {options.batch}, r={options.r}, {options.dtype}, {options.rounds} rounds", flush=True
    )
    result = compare(options.model, options.batch, options.r, dtype, options.rounds, options.variants)
    report(result, options.json)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
