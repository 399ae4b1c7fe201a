"""How large the numbers of a tensor are: a histogram of magnitudes that merges exactly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Sketch", "edge"]

BINS = 1 << 15  # sign aside, the upper half of a float32: 8 bits of exponent and 7 of mantissa
NOT_FINITE = 255 << 7  # from this bin on numbers are infinite, or none


def edge(number: int) -> float:
    """The least magnitude in a bin: a bfloat16, so that a threshold means the same in most types."""
    return float(np.uint32(number << 16).view(np.float32))


class Sketch:
    """Counts of |x| in bins 0.4 to 0.8 % wide, whatever the scale of x: adding is integer addition, in any order.

    A quantile taken from it is at most one bin too large. All numbers are taken as float32.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def finite(self) -> bool:
        """Whether no number was infinite or none."""
        return not bool(self.counts[NOT_FINITE:].any())

    def add(self, values: Tensor) -> None:
        """Count every number of a tensor, of any shape and floating type."""
        bits = values.detach().to(torch.float32).abs().contiguous().view(torch.int32) >> 16
        self.counts += torch.bincount(bits.flatten(), minlength=BINS).cpu().numpy()

    def merge(self, other: Sketch) -> None:
        self.counts += other.counts

    def threshold(self, share: float) -> float:
        """The least bin edge t such that at least this share of all numbers has |x| <= t, with 0 <= share < 1.

        Raises ValueError if nothing was counted.
        """
        if self.total == 0:
            raise ValueError("nothing was counted")
        wanted = math.ceil(share * self.total)
        if wanted <= int(self.counts[0]):
            return 0.0  # as many are zero, or as good as
        last = int(np.searchsorted(self.counts.cumsum(), wanted))
        return edge(min(last + 1, NOT_FINITE - 1))

    def share(self, threshold: float) -> float:
        """The share of all numbers that are at most a threshold, to a bin: what of them a mask leaves out."""
        number = max(int(np.float32(threshold).view(np.uint32)) >> 16, 1)
        return float(self.counts[:number].sum()) / max(self.total, 1)

    def to_json(self) -> dict[str, Any]:
        """The bins that hold anything, and their counts."""
        bins = self.counts.nonzero()[0]
        return {"bins": bins.tolist(), "counts": self.counts[bins].tolist()}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Sketch:
        """Raises ValueError, KeyError or TypeError for anything that `to_json` does not write."""
        bins, counts = np.array(data["bins"]), np.array(data["counts"])
        whole = all(numbers.dtype.kind == "i" or not numbers.size for numbers in (bins, counts))
        if not whole or bins.shape != counts.shape or len(np.unique(bins)) != bins.size:
            raise ValueError("bins and counts do not fit")
        if (counts < 0).any() or (bins < 0).any() or (bins >= BINS).any():
            raise ValueError("bins or counts out of range")
        sketch = Sketch()
        sketch.counts[bins.astype(np.int64)] = counts
        return sketch
