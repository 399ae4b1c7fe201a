"""Grids of patches: coarser ones, the cells that cover them; and numbers that look random but are not."""

from __future__ import annotations

from itertools import product
from math import ceil, floor, pi, sqrt
from typing import Any

import torch
from torch import Tensor

__all__ = ["cell_numbers", "coarser", "first_of_cells", "normal", "others", "shuffled"]

PRIME = 2**24 - 3  # the largest prime that float32 counts up to


def coarser(grid: tuple[int, int], keep: float) -> tuple[int, int]:
    """The grid of about the same shape with about `keep` times as many cells; at least one, at most the grid itself."""
    rows, columns = (sqrt(keep) * side for side in grid)
    sizes = product({max(floor(rows), 1), ceil(rows)}, {max(floor(columns), 1), ceil(columns)})
    wanted = keep * grid[0] * grid[1]
    return min(sizes, key=lambda size: (abs(size[0] * size[1] - wanted), abs(size[0] / rows - size[1] / columns), size))


def cell_numbers(grid: tuple[Any, Any], cells: tuple[Any, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """The cell row and the cell column [N] of each token, row major: token y of Y is in cell floor(y h / Y) of h."""
    rows = torch.arange(grid[0], device=device) * cells[0] // grid[0]
    columns = torch.arange(grid[1], device=device) * cells[1] // grid[1]
    shape = (grid[0], grid[1])
    return rows.unsqueeze(1).expand(shape).reshape(-1), columns.expand(shape).reshape(-1)


def first_of_cells(grid: tuple[Any, Any], cells: tuple[Any, Any], device: torch.device) -> Tensor:
    """The first token [K] of each cell, row major."""
    (rows, columns), (h, w) = grid, cells
    row = (torch.arange(h, device=device) * rows + (h - 1)) // h  # the least y with floor(y h / Y) = i
    column = (torch.arange(w, device=device) * columns + (w - 1)) // w
    first: Tensor = row.unsqueeze(1) * columns + column
    return first.reshape(-1)


def others(chosen: Tensor, length: Any) -> Tensor:
    """The numbers below `length` that are not among the distinct `chosen` [K], ascending."""
    taken = torch.zeros(length, dtype=torch.int64, device=chosen.device).scatter(0, chosen, 1)
    order: Tensor = taken.argsort(stable=True)
    return order[: length - chosen.shape[0]]


def shuffled(count: Any, seed: int, layer: int, device: torch.device) -> Tensor:
    """[count] distinct integers below PRIME in no visible order, the same on every device and in every run.

    x -> a x + c and x -> x^5 permute the numbers modulo PRIME, because 5 does not divide PRIME - 1. 48271 and 69621 are
    the usual multipliers of Lehmer generators (Park, Miller, Stockmeyer, CACM 36(7), 1993).
    """
    x = torch.arange(count, device=device)
    for multiplier, shift in ((48271, seed), (69621, layer)):
        x = (x * multiplier + (shift * 7919 + 12345) % PRIME) % PRIME
        square = x * x % PRIME
        x = square * square % PRIME * x % PRIME
    return x


def normal(rows: int, columns: Any, seed: int, device: torch.device) -> Tensor:
    """[rows columns] standard normal numbers in float32, the same on every device, up to rounding, and in every run.

    Box and Muller's transform (1958) of two `shuffled` sequences.
    """
    first, second = ((shuffled(rows * columns, seed, number, device) + 1) / PRIME for number in (0, 1))  # in (0, 1]
    drawn: Tensor = (-2 * first.log()).sqrt() * (2 * pi * second).cos()
    return drawn.view(rows, columns)
