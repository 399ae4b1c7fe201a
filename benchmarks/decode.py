"""Decode, where reading weights is what takes time: a recipe against backend="inductor", interleaved in one process.

    python -m benchmarks.decode --recipe "cats(sparsity=0.5)"

A Llama of 12 layers of width 1024 with random weights, 0.8 GB in float32, more than a processor's caches hold. Three
workloads: `generate()` of 64 tokens behind a prompt of 32, for one sequence and for four, and a prefill of 256 tokens.

    inductor        torch.compile(model, backend="inductor")
    without         the same with each MLP replaced by nothing: what it does not take is the MLPs' share
    exact           backend="tokred", no recipe: the exact passes alone
    recipe          backend="tokred" with the recipe; thresholds are calibrated on random tokens

Each round calls every variant once, every other round backwards; a ratio is the median over rounds of the quotients
within a round. With `--gain` (how many times faster one MLP is alone, as measured elsewhere) the speed-up that the
MLPs' share then predicts stands beside the measured one; without, what gain the measured speed-up amounts to. What
tokred's report predicts is the FLOPs before over those after, in the graph that runs most.

With random weights the neurons are those of no trained model: the speed is what a sparsity gives, and how good the
words are that it leaves is for docs/language.md to say. All variants generate as many words, not the same ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

import tokred
from benchmarks.compare import TOLERANCE, relative
from benchmarks.machine import describe
from benchmarks.token_sparse import measure
from tests.zoo.torchvision_shim import install
from tokred.compiler.report import GraphReport
from tokred.registry.recipe import parse_recipe

VOCABULARY = 4096
PROMPT, PREFILL, WORDS = 32, 256, 64
VARIANTS = ("inductor", "without", "exact", "recipe")
WORKLOADS = {"batch 1": (1, PROMPT), "batch 4": (4, PROMPT), "prefill": (1, PREFILL)}


class Nothing(nn.Module):
    """Stands where an MLP was: the residual stream gets nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def build(layers: int, width: int, dtype: torch.dtype) -> Any:
    """Grouped keys, MLPs four times as wide as the model: most of the layers' weights are theirs."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 256),
        max_position_embeddings=2048,
    )
    return hf.LlamaForCausalLM(config).eval().to(dtype)


def without_mlps(model: Any) -> Any:
    """A model that shares all parameters but the MLPs'."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    result = copy.deepcopy(model, shared)  # what the memo holds is not copied
    for layer in result.model.layers:
        layer.mlp = Nothing()
    return result


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def compiled(model: Any, name: str, recipe: str | None, lower: str) -> Any:
    """One variant. Dense ones get tokred's caches too, so that all run the same loop."""
    from tokred.generation import with_pruned_caches  # imports transformers, which needs install()

    if name in ("inductor", "without"):
        dense = without_mlps(model) if name == "without" else model
        return with_pruned_caches(dense, lambda forward: torch.compile(forward, backend=lower))
    options: dict[str, Any] = {"lower": lower}
    if name == "recipe" and any(getattr(each, "calibrated", False) for each in parse_recipe(recipe).methods):
        options["calibration"] = tokred.calibrate(model, [{"input_ids": tokens(4, PREFILL, seed=2)}])
    return tokred.compile(model, recipe if name == "recipe" else None, **options)


def calls(function: Any, workload: str) -> Callable[[], Any]:
    batch, length = WORKLOADS[workload]
    ids = tokens(batch, length)
    if workload == "prefill":
        return partial(function, input_ids=ids, use_cache=False, logits_to_keep=1)
    return partial(function.generate, ids, do_sample=False, min_new_tokens=WORDS, max_new_tokens=WORDS, pad_token_id=0)


def check(model: Any, made: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    """How far the next word's logits are from the model's: nothing for dense variants, reported for a recipe."""
    ids, found = tokens(1, PROMPT), {}
    past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    want = model(input_ids=ids[:, -1:], past_key_values=copy.deepcopy(past)).logits
    for name, function in made.items():
        if name != "without":
            found[name] = relative(function(input_ids=ids[:, -1:], past_key_values=copy.deepcopy(past)).logits, want)
            if name != "recipe" and found[name] > TOLERANCE[dtype]:
                raise SystemExit(f"{name} differs from the model by {found[name]:.1e}; nothing was timed")
    return found


def faster(seconds: dict[str, list[float]], name: str) -> float:
    """How many times faster than Inductor."""
    return median(slow / fast for slow, fast in zip(seconds["inductor"], seconds[name], strict=True))


def summary(seconds: dict[str, list[float]], gain: float | None) -> dict[str, float]:
    """Speed-ups, the MLPs' share of the time, and what one says of the other."""
    found = {f"x inductor, {name}": faster(seconds, name) for name in seconds}
    if "without" not in seconds:
        return found
    found["share of the MLPs"] = share = 1 - 1 / faster(seconds, "without")
    if "recipe" in seconds:
        saved = 1 - 1 / found["x inductor, recipe"]  # of Inductor's time
        if gain is not None:
            found["predicted"] = 1 / (1 - share * (1 - 1 / gain))
        elif share > max(saved, 0):
            found["the MLPs' own gain"] = share / (share - saved)
    return found


def reported(graphs: list[GraphReport]) -> float | None:
    """FLOPs before over FLOPs after, of the last graph that a recipe was asked about; None if there is none."""
    asked = [graph for graph in graphs if any(row.method for row in graph.blocks)]
    return asked[-1].flops[0] / asked[-1].flops[1] if asked else None


def table(seconds: dict[str, list[float]], words: int) -> str:
    """Milliseconds of a call (median, quartiles), tokens a second, and how many times faster than Inductor."""
    lines = [f"{'':10s}{'ms':>9s}{'quartiles':>18s}{'tokens/s':>10s}{'x inductor':>12s}"]
    for name, each in seconds.items():
        low, middle, high = (1e3 * q for q in quantiles(each, n=4)) if len(each) > 1 else [1e3 * each[0]] * 3
        rate, ratio = 1e3 * words / middle, faster(seconds, name)
        lines.append(f"{name:10s}{middle:9.1f}{f'{low:.1f} .. {high:.1f}':>18s}{rate:10.1f}{ratio:12.3f}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    dtype = getattr(torch, options.dtype)
    model = build(options.layers, options.width, dtype)
    weights = {name: value.nbytes for name, value in model.named_parameters() if "layers" in name}
    mlps = sum(size for name, size in weights.items() if "mlp" in name) / sum(weights.values())
    result: dict[str, Any] = {"options": vars(options) | {"json": None}, "machine": describe(), "weights": mlps}
    names = [name for name in options.variants if name != "recipe" or options.recipe]
    made = {name: compiled(model, name, options.recipe, options.lower) for name in names}
    result["difference"] = check(model, made, dtype)
    for name, worst in result["difference"].items():
        print(f"next word's logits, {name}: {worst:.1e} from the model's", flush=True)
    print(f"of the layers' weights the MLPs have {mlps:.0%}")
    for workload in options.workloads:
        torch._dynamo.reset()  # all variants share one function, and each call looks through what it was compiled to
        before = len(tokred.reports().graphs)
        seconds = measure({name: calls(function, workload) for name, function in made.items()}, options.rounds)
        batch, length = WORKLOADS[workload]
        found = summary(seconds, options.gain)
        if (predicted := reported(tokred.reports().graphs[before:])) is not None:
            found["x FLOPs, report"] = predicted
        result[workload] = {"seconds": seconds, "summary": found}
        print(f"\n{workload}\n{table(seconds, batch * (length if workload == 'prefill' else WORDS))}")
        print(", ".join(f"{what} {number:.3f}" for what, number in found.items()), flush=True)
    return result


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    install()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--recipe")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--gain", type=float, help="how many times faster one MLP is alone")
    parser.add_argument("--lower", choices=["inductor", "aot_eager", "eager"], default="inductor")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--json", type=Path, help="also write everything, every sample included, to this file")
    options = parser.parse_args(arguments)
    if "inductor" not in options.variants:
        parser.error("--variants needs inductor: the others are measured against it")
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=32):  # three graphs of each variant
        result = run(options)
    print("\n" + ", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
