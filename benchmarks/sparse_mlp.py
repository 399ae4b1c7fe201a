"""Time the products of an MLP densely and with active neurons alone, all compiled by Inductor, interleaved.

    python -m benchmarks.sparse_mlp --width 2048 --hidden 8192 --tokens 1 4 8 --threads 2 --json out.json

Two programs. `down`: a linear whose input has a share of zeros, F.linear against tokred::sparse_linear. `mlp`: a whole
SwiGLU MLP against one of which the gate decides what of the rest is computed (CATS), tokred::gated_tail; the threshold
is the quantile of the gate's activations, so the share is met by data that the program does not know beforehand.
Which neurons are zero is drawn for each token on its own: of several tokens hardly a neuron is zero for all.

The weights are several copies that take turns, so that each call reads them from memory, as a model's layers do.
A ratio is the median of the quotients within a round: above 1 means faster than dense. `bound` is the quotient of the
bytes of weights that the two must read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from benchmarks.machine import describe
from benchmarks.token_sparse import measure
from tokred.backends.kernels.neurons import gated_tail, sparse_linear


def down(x: Tensor, weight: Tensor) -> Tensor:
    return linear(x, weight)


def sparse_down(x: Tensor, weight_t: Tensor, threshold: Tensor) -> Tensor:
    return sparse_linear(x, weight_t, None, threshold)


def mlp(x: Tensor, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    return linear(silu(linear(x, gate)) * linear(x, up), weight)


def sparse_mlp(x: Tensor, gate: Tensor, up: Tensor, weight_t: Tensor, threshold: Tensor) -> Tensor:
    return gated_tail(silu(linear(x, gate)), x, up, None, weight_t, None, threshold)


class Weights:
    """Copies of the three weights of an MLP, the last one in both layouts."""

    def __init__(self, copies: int, width: int, hidden: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(dtype)

        sizes = ((hidden, width), (hidden, width), (width, hidden))
        self.gate, self.up, self.down = ([normal(*size) for _ in range(copies)] for size in sizes)
        self.down_t = [w.T.contiguous() for w in self.down]
        self.turn = 0

    def next(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.turn = (self.turn + 1) % len(self.gate)
        return self.gate[self.turn], self.up[self.turn], self.down[self.turn], self.down_t[self.turn]


def programs(weights: Weights, tokens: int, share: float) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """For each program what runs densely and what leaves `share` of the neurons of a token out."""
    generator = torch.Generator().manual_seed(1)
    dtype, (hidden, width) = weights.gate[0].dtype, weights.gate[0].shape
    torch.compiler.reset()
    compiled: dict[Any, Any] = {
        f: torch.compile(f, fullgraph=True, dynamic=False) for f in (down, sparse_down, mlp, sparse_mlp)
    }
    act = torch.randn(tokens, hidden, generator=generator)
    zeros = torch.rand(tokens, hidden, generator=generator).argsort(1) < round(share * hidden)
    act = act.masked_fill(zeros, 0).to(dtype)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    gated = [silu(linear(x, gate)).float().abs().flatten().sort().values for gate in weights.gate]
    limits = [v[max(round(share * len(v)) - 1, 0)] if share else torch.tensor(-1.0) for v in gated]
    none = torch.tensor(0.0)

    def run(function: Any) -> Callable[[], Tensor]:
        def call() -> Tensor:
            gate, up, last, last_t = weights.next()
            inputs = (x, gate, up) if function in (mlp, sparse_mlp) else (act,)
            limit = limits[weights.turn] if function is sparse_mlp else none
            sparse = function in (sparse_down, sparse_mlp)
            result: Tensor = compiled[function](*inputs, *((last_t, limit) if sparse else (last,)))
            return result

        return call

    pairs = {"down": (down, sparse_down), "mlp": (mlp, sparse_mlp)}
    return {name: {"dense": run(dense), "sparse": run(sparse)} for name, (dense, sparse) in pairs.items()}


def compare(weights: Weights, tokens: int, share: float, rounds: int) -> list[dict[str, Any]]:
    read = 1 - share**tokens  # of the neurons, by chance
    bounds = {"down": 1 / max(read, 1e-9), "mlp": 3 / (1 + 2 * read)}
    found: list[dict[str, Any]] = []
    for program, functions in programs(weights, tokens, share).items():
        seconds = measure(functions, rounds)
        quotients = [dense / sparse for dense, sparse in zip(seconds["dense"], seconds["sparse"], strict=True)]
        found.append(
            {
                "program": program,
                "tokens": tokens,
                "zeros": share,
                "ratio": median(quotients),
                "bound": bounds[program],
                "median": {name: median(values) for name, values in seconds.items()},
                "seconds": seconds,
            }
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    weights = Weights(options.copies, options.width, options.hidden, getattr(torch, options.dtype))
    results: list[dict[str, Any]] = []
    print(f"{'':6}{'tokens':>7}{'zeros':>7}{'dense ms':>10}{'sparse ms':>11}{'ratio':>8}{'bound':>8}")
    with torch.no_grad():
        for tokens in options.tokens:
            for share in options.zeros:
                for row in compare(weights, tokens, share, options.rounds):
                    ms = {name: 1e3 * value for name, value in row["median"].items()}
                    print(
                        f"{row['program']:6}{tokens:7}{share:7.2f}{ms['dense']:10.2f}{ms['sparse']:11.2f}"
                        f"{row['ratio']:8.2f}{row['bound']:8.2f}"
                    )
                    results.append(row)
    if options.json is not None:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({"machine": describe(), "settings": settings, "results": results}, indent=1))


if __name__ == "__main__":
    main()
