"""Measure the numbers of tokred/compiler/machine.py here: python -m benchmarks.calibrate [--threads 2] [--seconds 1]

    flops      products as in a ViT-S MLP, [B*197 384] x [1536 384], for each type
    bandwidth  what add + layer norm and gelu, compiled, read and write a second
    kernel     the slope of a compiled chain of tiny products and softmaxes: the least that a kernel can cost
    sites      what tome(r=13) costs at one site (plan and reduce, compiled, less a slice), beside the model's estimate

The fastest of many calls is taken: on a shared machine everything slower is somebody else's work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import describe
from tokred.compiler.machine import Extent, Machine, method_seconds
from tokred.registry.recipe import parse_recipe
from tokred.registry.site import Site

WIDTH, HEADS, R = 384, 6, 13


def fastest(seconds: float, function: Callable[..., object], *args: object, **kwargs: object) -> float:
    call = partial(function, *args, **kwargs)
    for _ in range(3):
        call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def rates(seconds: float) -> dict[str, float]:
    """FLOPs a second of dense products, by type."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for rows in (197, 8 * 197):
            x, weight = torch.randn(rows, WIDTH).to(dtype), torch.randn(4 * WIDTH, WIDTH).to(dtype)
            spent = fastest(seconds, F.linear, x, weight)
            found[f"{dtype} {rows} rows"] = 8 * rows * WIDTH * WIDTH / spent
    for batch in (1, 8):
        query = torch.randn(batch, HEADS, 197, WIDTH // HEADS)
        mask = torch.zeros(batch, 1, 1, 197)
        for name, given in (("attention", None), ("attention with mask", mask)):
            spent = fastest(seconds, F.scaled_dot_product_attention, query, query, query, attn_mask=given)
            found[f"{name} batch {batch}"] = 4 * batch * 197 * 197 * WIDTH / spent
    return found


def bandwidth(seconds: float) -> dict[str, float]:
    """Bytes a second that element-wise kernels move."""

    def add_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return F.layer_norm(x + y, (WIDTH,)), x + y

    found = {}
    for batch in (1, 8):
        x, y = torch.randn(batch, 197, WIDTH), torch.randn(batch, 197, WIDTH)
        z = torch.randn(batch, 197, 4 * WIDTH)
        norm, gelu = torch.compile(add_norm, dynamic=False), torch.compile(F.gelu, dynamic=False)
        found[f"add + layer norm, batch {batch}"] = 4 * 4 * x.numel() / fastest(seconds, norm, x, y)
        found[f"gelu, batch {batch}"] = 2 * 4 * z.numel() / fastest(seconds, gelu, z)
    return found


def kernel(seconds: float) -> float:
    """Seconds for one more kernel that has next to nothing to do."""

    def chain(length: int) -> Callable[[Tensor, Tensor], Tensor]:
        def function(x: Tensor, weight: Tensor) -> Tensor:
            for _ in range(length):
                x = (x @ weight).softmax(-1)
            return x

        return torch.compile(function, dynamic=False)

    x, weight = torch.randn(2, 8, 8), torch.randn(2, 8, 8)
    short, long = chain(4), chain(20)
    return (fastest(seconds, long, x, weight) - fastest(seconds, short, x, weight)) / 32


def sites(seconds: float, machine: Machine) -> list[str]:
    """What one site of tome costs beyond a slice, measured and estimated."""
    method = parse_recipe(f"tome(r={R})").methods[0]

    def reduced(hidden: Tensor, key: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        site = Site(layer=0, depth=12, tokens=hidden.shape[1], head=1, hidden=hidden, key=key, size=size)
        token_map = method.plan(site)
        y = token_map.reduce(hidden)
        return F.layer_norm(y, (WIDTH,)), y, token_map.size.log()  # type: ignore[attr-defined]

    def cut(hidden: Tensor, key: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        y = hidden[:, :-R]
        return F.layer_norm(y, (WIDTH,)), y + 0, size[:, :-R].log()

    lines = []
    for batch in (1, 8):
        for tokens in (197, 119, 54):
            hidden, size = torch.randn(batch, tokens, WIDTH), torch.ones(batch, tokens)
            key = torch.randn(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)[1]
            torch._dynamo.reset()
            ours, slice_ = torch.compile(reduced, dynamic=False), torch.compile(cut, dynamic=False)
            spent = fastest(seconds, ours, hidden, key, size) - fastest(seconds, slice_, hidden, key, size)
            extent = Extent(batch, tokens, R, WIDTH, HEADS, WIDTH // HEADS)
            guess = method_seconds(method, extent, machine)
            lines.append(f"batch {batch}, {tokens:3d} tokens: {1e6 * spent:6.0f} us, estimated {1e6 * guess:6.0f} us")
    return lines


def main() -> None:
    summary = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibrate", description=summary)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(", ".join(f"{key} {value}" for key, value in describe().items()), flush=True)
    with torch.no_grad():
        for name, rate in rates(options.seconds).items():
            print(f"{name:28s} {rate / 1e9:7.1f} GFLOP/s", flush=True)
        for name, rate in bandwidth(options.seconds).items():
            print(f"{name:28s} {rate / 1e9:7.1f} GB/s", flush=True)
        print(f"{'kernel':28s} {1e6 * kernel(options.seconds):7.1f} us", flush=True)
        for line in sites(options.seconds, Machine.of(torch.device("cpu"))):
            print(line, flush=True)


if __name__ == "__main__":
    main()
