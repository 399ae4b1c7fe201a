"""Time MiniLM with its real weights on a batch of real sentences of which half is padding.

    python -m benchmarks.padding --batch 32 --padding 0.5

    eager       the unmodified model with mean pooling, as sentence-transformers wraps it
    inductor    torch.compile(model, backend="inductor")
    tokred      torch.compile(model, backend="tokred"): exact passes, so the same embeddings
    ideal       backend="inductor" on as many tokens without any padding (fewer, longer sentences)
    full        backend="tokred" on as large a batch without padding
    full_inductor   the same with backend="inductor": what `full` must not be slower than

Rounds and ratios are those of benchmarks/compare.py. The sentences are docstrings of Python's own library.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compare import Result, inductor, measure, relative, table, tokred
from benchmarks.machine import describe
from tests.zoo.text import minilm, minilm_tokenizer
from tests.zoo.torchvision_shim import install

VARIANTS = ("eager", "inductor", "tokred", "ideal", "full", "full_inductor")
BASES = ("eager", "inductor", "ideal", "full_inductor")
MODULES = ("argparse", "ast", "asyncio", "collections", "csv", "datetime", "decimal", "difflib", "email.message",
           "fractions", "functools", "inspect", "logging", "os", "pathlib", "random", "re", "shutil", "socket",
           "statistics", "string", "subprocess", "tempfile", "textwrap", "threading", "typing", "unittest",
           "urllib.parse", "zipfile")  # fmt: skip
LONGEST = 128  # tokens; the model was trained on sentences of up to 128


class Embedder(nn.Module):
    """Mean pooling and normalisation behind an unmodified encoder (Reimers and Gurevych 2019, arXiv 1908.10084)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        ids, valid = inputs  # [B N] [B N]
        hidden = self.model(input_ids=ids, attention_mask=valid).last_hidden_state  # [B N C]
        weight = valid.unsqueeze(-1).expand(hidden.shape).float()
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)  # [B C]


def docstrings() -> list[str]:
    """First paragraphs and whole texts, in a fixed order: of many lengths."""
    found = set()
    for name in MODULES:
        for _, thing in inspect.getmembers(importlib.import_module(name)):
            text = inspect.getdoc(thing) if callable(thing) else None
            if text and text.isascii():
                found |= {" ".join(text.split()), " ".join(text.split("\n\n")[0].split())}
    return sorted(found)


def sentences(batch: int, padding: float) -> tuple[Tensor, Tensor]:
    """Ids and their mask, [B N] each, of sentences drawn until the share of padding is within 1 % of what is wanted."""
    tokenize, texts, draw = minilm_tokenizer(), docstrings(), random.Random(0)
    lengths = [len(ids) for ids in tokenize(texts, truncation=True, max_length=LONGEST)["input_ids"]]
    for _ in range(100_000):
        chosen = draw.sample(range(len(texts)), batch)
        total = sum(lengths[i] for i in chosen)
        if max(lengths[i] for i in chosen) == LONGEST and abs(1 - total / (batch * LONGEST) - padding) < 0.01:
            made = tokenize(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
            )
            return made["input_ids"], made["attention_mask"]
    raise SystemExit(f"no batch of {batch} docstrings with {padding:.0%} padding was found")


def unpadded(batch: int) -> tuple[Tensor, Tensor]:
    """As `sentences`, of texts that are cut at the longest length."""
    tokenize = minilm_tokenizer()
    made = tokenize(docstrings(), truncation=True, max_length=LONGEST)["input_ids"]
    ids = torch.tensor([row for row in made if len(row) == LONGEST][:batch])
    return ids, torch.ones_like(ids)


def compare(batch: int, padding: float, rounds: int, dtype: torch.dtype, wanted: list[str]) -> Result:
    install()
    x = sentences(batch, padding)
    real = int(x[1].sum())
    result = Result(f"minilm, {1 - real / x[1].numel():.1%} padding", batch, 0, str(dtype).split(".")[1], describe())
    model = Embedder(minilm()).eval().to(dtype)
    with torch.no_grad():
        fewer, full = unpadded(round(real / LONGEST)), unpadded(batch)
        fixed: dict[str, Any] = {
            "ideal": (torch.compile(model, backend="inductor", dynamic=False), fewer),
            "full_inductor": (torch.compile(model, backend="inductor", dynamic=False), full),
            "full": (torch.compile(model, backend="tokred", dynamic=False), full),
        }
        made: dict[str, Any] = {"eager": model, "inductor": inductor(model), "tokred": tokred(model)}
        made |= {name: lambda _, run=run, own=own: run(own) for name, (run, own) in fixed.items()}
        made = {name: run for name, run in made.items() if name in wanted}
        expected = model(x)
        for name, run in made.items():
            start = time.perf_counter()
            answer = run(x)
            result.first_call[name] = time.perf_counter() - start
            if name not in fixed and name != "eager":
                result.checks[f"{name} ~ eager ({result.dtype})"] = worst = relative(answer, expected)
                if not worst <= {torch.float32: 1e-5, torch.bfloat16: 1e-1}[dtype]:
                    raise SystemExit(f"{name} differs from eager by {worst:.1e}; nothing was timed")
            run(x)
        measure(made, x, rounds, result)  # type: ignore[arg-type]
    return result


def to_json(result: Result) -> dict[str, Any]:
    """As compare.py writes it, with this benchmark's variants."""
    names, bases = list(result.seconds), [base for base in BASES if base in result.seconds]
    ratios = {name: {base: result.speedup(name, base) for base in bases} for name in names}
    return {**result.__dict__, "speedup": ratios, "median": {name: median(result.seconds[name]) for name in names}}


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.padding", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--padding", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path, help="also write everything, every sample included, to this file")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    result = compare(options.batch, options.padding, options.rounds, dtype, options.variants)
    print(table(result))
    for name, base in (("tokred", "inductor"), ("ideal", "inductor"), ("full", "full_inductor")):
        if {name, base} <= set(options.variants):
            print(f"{name} over {base}: {result.speedup(name, base):.3f}")
    print(", ".join(f"{key} {value}" for key, value in result.machine.items()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(to_json(result), indent=1))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
