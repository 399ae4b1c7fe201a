"""Cells, coarser grids and the draw, against plain loops."""

import pytest
import torch

from tokred.registry.grid import PRIME, cell_numbers, coarser, first_of_cells, normal, others, shuffled

CPU = torch.device("cpu")
GRIDS = [((6, 6), (3, 3)), ((5, 7), (2, 3)), ((1, 11), (1, 4)), ((14, 14), (9, 13)), ((3, 4), (3, 4)), ((7, 2), (1, 1))]


@pytest.mark.parametrize("grid, cells", GRIDS)
def test_cells_are_rectangles_that_cover_the_grid(grid, cells):
    row, column = cell_numbers(grid, cells, CPU)
    expected = [(y * cells[0] // grid[0], x * cells[1] // grid[1]) for y in range(grid[0]) for x in range(grid[1])]
    assert list(zip(row.tolist(), column.tolist(), strict=True)) == expected
    assert len(set(expected)) == cells[0] * cells[1]


@pytest.mark.parametrize("grid, cells", GRIDS)
def test_first_of_cells_is_the_first_token_of_each(grid, cells):
    row, column = cell_numbers(grid, cells, CPU)
    number = (row * cells[1] + column).tolist()
    assert first_of_cells(grid, cells, CPU).tolist() == [number.index(cell) for cell in range(cells[0] * cells[1])]


def test_others_are_the_rest_in_order():
    assert others(torch.tensor([4, 0, 7]), 9).tolist() == [1, 2, 3, 5, 6, 8]
    assert others(torch.arange(3), 3).tolist() == []


@pytest.mark.parametrize(
    "grid, keep, expected",
    [
        ((14, 14), 0.25, (7, 7)),
        ((14, 14), 0.5, (10, 10)),
        ((6, 6), 1.0, (6, 6)),
        ((6, 6), 0.001, (1, 1)),
        ((1, 10), 0.5, (1, 7)),
        ((32, 8), 0.25, (16, 4)),
        ((5, 7), 0.5, (4, 4)),
    ],
)
def test_coarser_has_about_the_share_and_the_shape(grid, keep, expected):
    assert coarser(grid, keep) == expected


def test_coarser_is_never_finer():
    for rows in range(1, 12):
        for columns in range(1, 12):
            for keep in (0.03, 0.3, 0.62, 0.97, 1):
                h, w = coarser((rows, columns), keep)
                assert 1 <= h <= rows
                assert 1 <= w <= columns


def test_shuffled_numbers_differ_and_depend_on_seed_and_layer():
    draws = [shuffled(4096, seed, layer, CPU) for seed in (0, 1, -5, 10**9) for layer in (0, 1, 11)]
    for draw in draws:
        assert draw.unique().numel() == 4096
        assert draw.min() >= 0
        assert draw.max() < PRIME
        assert torch.equal(draw.float().long(), draw)  # float32 counts that far
    orders = {tuple(draw.argsort().tolist()) for draw in draws}
    assert len(orders) == len(draws)


def test_shuffled_numbers_show_no_trend():
    """Neighbours are as often in rising as in falling order, and every part of the range is met equally often."""
    draw = shuffled(10000, 0, 0, CPU)
    rising = (draw.diff() > 0).double().mean().item()
    assert abs(rising - 0.5) < 0.02
    tenths = torch.histc(draw.double(), 10, 0, PRIME)
    assert ((tenths - 1000).abs() < 120).all()  # four standard deviations


def test_the_draw_is_a_fixed_one():
    """Outputs of old recipes must not change: these numbers are part of what `random` promises."""
    assert shuffled(4, 0, 0, CPU).tolist() == [1375159, 14001981, 13585086, 16309848]
    expected = []
    for x in range(50):
        for multiplier, shift in ((48271, 7), (69621, 3)):
            x = pow(x * multiplier + shift * 7919 + 12345, 5, PRIME)
        expected.append(x)
    assert shuffled(50, 7, 3, CPU).tolist() == expected


def test_normal_numbers_are_normal_and_unrelated():
    """Moments and shares, and no two rows, columns or seeds that go together: each within five standard deviations."""
    drawn = normal(64, 1024, 0, CPU).double()
    count = drawn.numel()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = {1: 1, 2: 2, 3: 15, 4: 96, 6: 10170}[power] ** 0.5  # of x^power
        assert abs(drawn.pow(power).mean().item() - moment) < 5 * spread / count**0.5
    for bound, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert abs((drawn.abs() < bound).double().mean().item() - share) < 0.01
    assert drawn.isfinite().all()
    between = drawn @ drawn.T / 1024
    assert (between - torch.eye(64)).abs().max() < 5 * 2**0.5 / 32
    for other in (normal(64, 1024, 1, CPU), normal(65, 1024, 0, CPU)[1:], drawn.roll(1, 1)):
        assert abs((drawn * other).mean().item()) < 5 / count**0.5


def test_normal_numbers_are_fixed_ones():
    """Outputs of old recipes must not change."""
    expected = [[1.4318, -0.3227], [0.4464, -0.1452]]
    torch.testing.assert_close(normal(2, 2, 0, CPU), torch.tensor(expected), rtol=0, atol=1e-4)
