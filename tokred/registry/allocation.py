"""How much to leave out at each place of a layer, so that together they leave out a given share of its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["STEP", "greedy_shares", "last_share", "share_along"]

STEP = 0.01  # what one step leaves out of a layer's weights; calibration files hold one number a step


def greedy_shares(error: Callable[[list[float]], float], sizes: Sequence[int]) -> list[list[float]]:
    """Raise the shares left out at the places of a layer step by step, each time where the error is then the least.

    Liu et al., TEAL, arXiv 2408.14690, algorithm 1. What a place's share rises by is inverse to its size, so that each
    step leaves out as many bytes as any other.

    error   of the layer's output with these shares left out, one for each place; of equal ones the first place is taken
    sizes   bytes of the weights at each place

    Returns the places' shares [place][k] after k steps, which leave out k * STEP of all bytes. It ends where a step at
    any place would leave nothing there: not before 1 - len(sizes) * STEP.
    """
    total = sum(sizes)
    rises = [STEP * total / size for size in sizes]
    steps = [0] * len(sizes)
    rows = [[0.0] * len(sizes)]
    while True:
        tried = []
        for place, rise in enumerate(rises):
            share = (steps[place] + 1) * rise
            if share < 1:
                row = [*rows[-1][:place], share, *rows[-1][place + 1 :]]
                tried.append((error(row), place, row))
        if not tried:
            return [list(column) for column in zip(*rows, strict=True)]
        _, place, row = min(tried)
        steps[place] += 1
        rows.append(row)


def share_along(shares: Sequence[float], sparsity: float) -> float:
    """The share left out at one place where its layer leaves out `sparsity`; between two steps a part of the second."""
    return float(np.interp(sparsity, STEP * np.arange(len(shares)), shares))


def last_share(shares: Sequence[float]) -> float:
    """What the layer leaves out at the end of a place's shares."""
    return round(STEP * (len(shares) - 1), 6)
