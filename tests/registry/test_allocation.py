"""Greedy shares: each step leaves out as many bytes, where the error is then the least."""

from itertools import pairwise

import pytest

from tokred.registry.allocation import STEP, greedy_shares, last_share, share_along


def test_each_step_goes_where_the_error_is_least():
    """Errors that add up and grow with the square: a place is raised while its slope, by bytes, is the flattest."""
    weights, sizes = (1.0, 4.0, 100.0), (600, 300, 100)
    seen = []

    def error(shares):
        seen.append(tuple(shares))
        return sum(weight * share**2 for weight, share in zip(weights, shares, strict=True))

    columns = greedy_shares(error, sizes)
    rows = list(zip(*columns, strict=True))
    assert rows[0] == (0.0, 0.0, 0.0) and len(seen) == len(set(seen))
    rises = [STEP * 1000 / size for size in sizes]
    for number, (before, after) in enumerate(pairwise(rows), 1):
        left_out = sum(share * size for share, size in zip(after, sizes, strict=True))
        assert left_out == pytest.approx(number * STEP * 1000)
        (place,) = [i for i in range(3) if before[i] != after[i]]
        slopes = [
            w * ((share + rise) ** 2 - share**2) if share + rise < 1 else float("inf")
            for w, share, rise in zip(weights, before, rises, strict=True)
        ]
        assert slopes[place] == pytest.approx(min(slopes))
    assert rows[40][2] == 0 and rows[40][0] > rows[40][1] > 0  # the dear place comes last
    assert last_share(columns[0]) >= 0.97 and all(share < 1 for share in rows[-1])


def test_equal_errors_take_the_first_place():
    assert [column[:3] for column in greedy_shares(lambda shares: 0.0, (1, 1))] == [[0, 0.02, 0.04], [0, 0, 0]]


def test_between_two_steps_a_part_of_the_second():
    shares = (0.0, 0.1, 0.1, 0.4)
    assert [share_along(shares, s) for s in (0, 0.005, 0.01, 0.02, 0.03)] == pytest.approx([0, 0.05, 0.1, 0.1, 0.4])
    assert share_along(shares, 0.0225) == pytest.approx(0.175)
    assert last_share(shares) == pytest.approx(0.03)
