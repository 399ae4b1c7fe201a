"""Time one causal attention densely (SDPA) and as token_sparse_attention computes it, interleaved.

    python -m benchmarks.token_sparse --tokens 2048 4096 8192 16384

Queries and keys are synthetic, in two ways. `peaked`: as attention in long texts is described, every head has a sink
(the first key), a sense of nearness, and a few keys that matter to all queries: a query is a head's own direction plus
noise, a key has that direction in a log-normal amount, the sink most of it; nearness is a rotation of four channels by
position. How uneven the amounts are (`--spread`) is chosen, not measured: at 0.7, 60 % of 16K tokens attend, more than
the half that the paper's speed-up implies. `random`: independent normal numbers, where no token matters more than
another and almost none is left out.

For each, the rows that attended (the realised share of the tokens), the probability mass of the last queries that they
hold, and the time; then what tokred's cost model predicts on this machine, and from how many tokens on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.machine import describe
from tokred.backends.kernels.token_sparse import choose_rows, token_sparse_attention, window_scores
from tokred.compiler.cost import pays_from, predict_attention
from tokred.compiler.machine import Machine
from tokred.registry.sparsify.token_sparse_attention import TokenSparseAttention

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def peaked(heads: int, groups: int, tokens: int, width: int, spread: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """[1 H N D], [1 G N D], [1 G N D]: a sink, nearness, and few keys that matter."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    direction = normal(groups, 1, width)
    direction /= direction.norm(dim=-1, keepdim=True)
    amount = normal(groups, tokens, 1).mul(spread).exp()  # log-normal: few keys have much of it
    amount[:, 0] = 12
    key = 0.5 * normal(groups, tokens, width) + 2 * amount * direction
    query = 0.5 * normal(heads, tokens, width)
    query += 0.35 * width**0.5 * direction.repeat_interleave(heads // groups, 0)
    angle = torch.arange(tokens).float()[:, None] * torch.tensor([1 / 200, 1 / 2000])
    near = 1.5 * width**0.25 * torch.cat([angle.cos(), angle.sin()], -1)
    key[..., :4], query[..., :4] = near, near
    return query[None], key[None], normal(1, groups, tokens, width)


def random(heads: int, groups: int, tokens: int, width: int, spread: float = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The same sizes, and nothing in them."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, tokens, width), (1, groups, tokens, width), (1, groups, tokens, width))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


KINDS = {"peaked": peaked, "random": random}


def realised(method: TokenSparseAttention, query: Tensor, key: Tensor) -> dict[str, float]:
    """The share of the tokens that attend in each head, and how much of the last queries' attention they hold."""
    scale, tokens = query.shape[-1] ** -0.5, query.shape[2]
    options = (method.coverage, method.window, method.least, method.kernel, method.grouped)
    rows = choose_rows(query[0], key[0], scale, *options)
    if rows is None:
        return {"share": 1.0, "mass": 1.0}
    score = window_scores(query[0], key[0], method.window, scale)
    own = rows[:, : -method.window].repeat_interleave(score.shape[0] // rows.shape[0], 0)
    return {"share": rows.shape[1] / tokens, "mass": float((score.gather(1, own).sum(1) / score.sum(1)).mean())}


def measure(functions: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each; a round calls every function once, every other round backwards."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def node_of(query: Tensor, key: Tensor, value: Tensor) -> fx.Node:
    """A causal SDPA of these sizes as a node, for the cost model."""
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in "qkv"]
    for node, tensor in zip(nodes, (query, key, value), strict=True):
        node.meta["val"] = tensor
    sdpa = graph.call_function(SDPA, tuple(nodes), {"is_causal": True, "enable_gqa": True})
    sdpa.meta["val"] = query
    return sdpa


def compare(kind: str, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    inputs = KINDS[kind](options.heads, options.groups, tokens, options.width, options.spread)
    query, key, value = (x.to(getattr(torch, options.dtype)) for x in inputs)
    functions: dict[str, Any] = {
        "dense": lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    }
    result: dict[str, Any] = {"kind": kind, "tokens": tokens, "realised": {}, "predicted": {}}
    for name, grouped in (("sparse", False), ("grouped", True)):
        method = TokenSparseAttention(grouped=grouped)
        functions[name] = lambda method=method: token_sparse_attention(
            query, key, value, None, None, method.coverage, method.window, method.least, method.kernel, method.grouped
        )
        result["realised"][name] = realised(method, query, key)
    machine = Machine.of(query.device)
    found = predict_attention(method, node_of(query, key, value), tokens, machine)
    result["predicted"] = {"saves": found.saves, "costs": found.costs, "pays": found.pays}
    result["seconds"] = seconds = measure(functions, options.rounds)
    result["speedup"] = {
        name: median(a / b for a, b in zip(seconds["dense"], seconds[name], strict=True)) for name in functions
    }
    return result


def table(results: list[dict[str, Any]]) -> str:
    heads = ("tokens", "dense s", "sparse s", "attend", "mass", "x dense", "grouped")
    lines = [" " * 8 + "".join(f"{head:>9s}" for head in heads)]
    for each in results:
        dense, sparse = (median(each["seconds"][name]) for name in ("dense", "sparse"))
        share, mass = (each["realised"]["sparse"][name] for name in ("share", "mass"))
        faster = "".join(f"{each['speedup'][name]:9.2f}" for name in ("sparse", "grouped"))
        lines.append(f"{each['kind']:8s}{each['tokens']:9d}{dense:9.3f}{sparse:9.3f}{share:9.1%}{mass:9.2%}{faster}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.token_sparse", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1280, 2048, 4096, 8192, 16384])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--spread", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    machine = describe()
    with torch.no_grad():
        results = [compare(kind, tokens, options) for kind in options.kinds for tokens in options.tokens]
        sample = node_of(*random(options.heads, options.groups, 8, options.width))
    method = TokenSparseAttention()
    shortest = method.shortest or 1
    start = pays_from(
        lambda n: predict_attention(method, sample, n, Machine.of(sample.meta["val"].device)).pays, shortest
    )
    print(table(results))
    print(f"nothing is left out of fewer than {shortest} tokens; predicted to pay from {start} on, if half attend")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    written = {"options": vars(options) | {"json": None}, "machine": machine, "results": results, "pays_from": start}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(written, indent=1))
    return written


if __name__ == "__main__":
    main(sys.argv[1:])
