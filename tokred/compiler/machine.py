"""What a machine does in a second, in the few numbers that decide whether a site pays; what a method costs on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tokred.registry.method import Reduction

__all__ = ["Extent", "Machine", "method_seconds"]


@dataclass(frozen=True)
class Machine:
    """FLOPs a second of dense products by type, bytes a second of everything else, seconds to start one kernel.

    A kernel here is a call of a method's own: allocation, Python and the launch together.
    """

    name: str
    flops: Mapping[torch.dtype, float]
    bandwidth: float
    kernel: float

    @staticmethod
    def of(device: torch.device) -> Machine:
        """The entry for a device: a CPU with torch's present number of threads, or else a large GPU."""
        return _cpu(torch.get_num_threads()) if device.type == "cpu" else H100

    def seconds(self, flops: Mapping[torch.dtype, float], moved: float, kernels: int = 0) -> float:
        slowest = min(self.flops.values())
        counted = sum(count / self.flops.get(dtype, slowest) for dtype, count in flops.items())
        return counted + moved / self.bandwidth + kernels * self.kernel


def _cpu(threads: int) -> Machine:
    """AMD EPYC (Zen 3, AVX2), measured with benchmarks/calibrate.py on 2026-11-22, torch 2.13.0.

    One thread, fastest of a second's calls: float32 50 (197 rows) to 65 (1576 rows) GFLOP/s, attention 62, float64 34
    to 42, bfloat16 and float16 7 to 8 (no instructions for them: oneDNN emulates); layer norm 12 to 18 GB/s, gelu 5.
    A fused kernel starts in 1 us, a sort or a product with its allocations takes 15: 10 us each is what makes the eight
    calls of tome come out right (below). Products scale with threads; a socket's memory is taken to be
    full at 60 GB/s. Processors with AVX-512 or AMX do more FLOPs: there, sites pay a little less than this says.
    """
    rates = {torch.float32: 6e10, torch.float64: 4e10, torch.bfloat16: 7.5e9, torch.float16: 8e9}
    scaled = {dtype: threads * rate for dtype, rate in rates.items()}
    return Machine(f"cpu, {threads} threads", scaled, min(threads * 1e10, 6e10), 1e-5)


# NVIDIA's data sheet for the H100 SXM (2023): dense peaks 989 TFLOP/s in half precision, 67 in float32 and float64,
# 3.35 TB/s. Not measured here; 0.6 of the peaks is a usual share. 4 us is a launch from Python, no CUDA graphs.
H100 = Machine(
    "cuda, as an H100",
    {torch.float16: 5.9e14, torch.bfloat16: 5.9e14, torch.float32: 4e13, torch.float64: 4e13},
    2e12,
    4e-6,
)


@dataclass(frozen=True)
class Extent:
    """The sizes of a site as numbers: letters as everywhere, and the bytes of one element."""

    batch: int
    tokens: int
    removed: int
    channels: int
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32

    @property
    def stream(self) -> int:
        """Bytes of the residual stream before the cut."""
        return self.batch * self.tokens * self.channels * self.dtype.itemsize


def method_seconds(method: Reduction, site: Extent, machine: Machine) -> float:
    """What it costs to choose and to move tokens at one site, by the kind of method: an estimate.

    Merging by similarity compares half of the tokens with the other half and sorts; ranking by the class token is one
    row of attention; superpixels are a few rounds of clustering with dense matrices; the rest reads the stream once.
    """
    n, k, b = site.tokens, site.tokens - site.removed, site.batch
    keys = b * site.heads * n * site.head_dim
    item = site.dtype.itemsize
    if "grid" in method.needs and method.scope == "persistent":
        rounds = int(getattr(method, "iterations", 5)) + 2  # the last likeness, and the reduction itself
        flops, moved, kernels = 4 * b * n * k * site.channels * rounds, 3 * b * n * k * item * rounds, 4 * rounds
    elif method.kind == "merge":
        width = site.head_dim if "keys" in method.needs else site.channels
        scored = keys * item if "keys" in method.needs else site.stream
        # mean of the heads and norm, product, maximum, two sorts, gathers and scatters of rows and of sizes
        flops, moved, kernels = 2 * b * (n // 2) ** 2 * width, scored + 3 * b * (n // 2) ** 2 * item, 8
    elif "class_token" in method.needs:
        flops, moved, kernels = 2 * keys, keys * item, 6
    else:
        flops, moved, kernels = 0, site.stream, 4
    return machine.seconds({site.dtype: flops}, moved + site.stream, kernels)
