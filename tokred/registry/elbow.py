"""How many tokens stand out: the elbow of a sorted curve, and the share of a fixed few that has room for as many."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

__all__ = ["elbow", "share_with_room"]


def elbow(values: Tensor) -> Tensor:
    """[..] how many of the values [.. N] are larger than the one at the elbow of their sorted curve.

    The elbow is the point, of the values in descending order, that is farthest from the straight line between the first
    and the last of them ("maximum geometric distance"); the first of several. A straight line has none: all N count.
    Tensor operations alone, so it can be traced; but a graph's shapes cannot depend on what it finds.
    """
    curve = values.sort(-1, descending=True).values
    curve = curve if curve.dtype == torch.float64 else curve.float()
    first, last = curve[..., :1], curve[..., -1:]
    along = torch.linspace(0, 1, curve.shape[-1], dtype=curve.dtype, device=curve.device)
    distance = (curve - (first + (last - first) * along)).abs()  # times one number, the cosine of the line's slope
    width = 32 * torch.finfo(curve.dtype).eps * curve.abs().amax(-1, keepdim=True)  # less is rounding
    found = distance >= distance.amax(-1, keepdim=True) - width
    at_elbow = curve.gather(-1, found.to(torch.uint8).argmax(-1, keepdim=True))
    counts = (curve > at_elbow).sum(-1)
    return torch.where((distance <= width).all(-1), curve.shape[-1], counts)


def share_with_room(counts: Tensor, whole: int, buckets: int = 8) -> float:
    """The smallest of the shares 1 / buckets, 2 / buckets, ... 1 of `whole` tokens with room for each of the counts.

    For a method's `keep`: tokens beyond the elbow fill the room that a sample leaves, the best of them first.
    Raises ValueError for a count that is not between 0 and `whole`.
    """
    most = int(counts.max())
    if int(counts.min()) < 0 or most > whole:
        raise ValueError(f"share_with_room: counts from {int(counts.min())} to {most} of {whole} tokens")
    return max(ceil(most * buckets / whole), 1) / buckets
