"""The operator against the slow reference: choices, masks, padding, groups, types, gradients; the Triton kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.reference import token_sparse as reference
from tokred.backends.kernels.token_sparse import (
    choose_rows,
    expected_rows,
    token_sparse_attention,
    unpadded,
    window_scores,
)

OPTIONS: dict[str, Any] = {"coverage": 0.2, "window": 6, "least": 10, "kernel": 5, "grouped": False}
LENGTH = 40


def operands(
    batch: int = 2, length: int = LENGTH, heads: int = 4, groups: int = 2, width: int = 8, channels: int = 8
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch + length + heads)
    shapes = [(batch, heads, length, channels), (batch, groups, length, channels), (batch, groups, length, width)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    sharpness = 1 + 2 * torch.arange(batch, dtype=torch.float64).reshape(-1, 1, 1, 1)  # samples keep different numbers
    return [query * sharpness, key, value]


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: Any = None, **other: Any) -> Tensor:
    return token_sparse_attention(q, k, v, mask, scale, *(OPTIONS | other).values())


def dense(*inputs: Tensor) -> Tensor:
    return scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)


def causal_mask(valid: Tensor) -> Tensor:
    """[B 1 N N] from [B N], as transformers makes it."""
    length = valid.shape[1]
    return (torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None]).unsqueeze(1)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"grouped": True},
    {"coverage": 0.7},
    {"coverage": 0.02, "kernel": 1},
    {"window": 1, "least": 1},
    {"window": 29, "kernel": 3},
    {"scale": 0.3},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_operator_is_the_reference(options: dict[str, Any]) -> None:
    inputs = operands()
    wanted = reference.token_sparse(*inputs, **OPTIONS | options)
    torch.testing.assert_close(run(*inputs, **options), wanted, rtol=1e-10, atol=1e-10)
    rows = (wanted != 0).any(-1).sum(-1)
    assert (rows < LENGTH).all(), "the reference leaves nothing out"
    assert options or len(rows.unique()) > 1, "every sample keeps as many: nothing depends on data"


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 8), (6, 1, 8), (2, 1, 5)])
def test_groups_and_widths(heads: int, groups: int, width: int) -> None:
    inputs = operands(1, heads=heads, groups=groups, width=width)
    for grouped in (False, True):
        wanted = reference.token_sparse(*inputs, **OPTIONS | {"grouped": grouped})
        torch.testing.assert_close(run(*inputs, grouped=grouped), wanted, rtol=1e-10, atol=1e-10)


def test_each_head_chooses_and_with_groups_the_key_head_does() -> None:
    query, key, _ = (x[0] for x in operands())
    choice = [1 / 8**0.5, *list(OPTIONS.values())[:4]]
    alone, together = choose_rows(query, key, *choice, False), choose_rows(query, key, *choice, True)
    assert alone is not None and together is not None
    assert alone.shape[0] == 4 and together.shape == (2, alone.shape[1])
    assert len({tuple(rows) for rows in alone.tolist()}) == 4
    for rows in (alone, together):
        assert (rows.diff(dim=-1) > 0).all(), "not in order"
        assert (rows[:, -6:] == torch.arange(LENGTH - 6, LENGTH)).all(), "the last queries stay"


def test_the_mass_that_a_layer_leaves_out_is_less_than_coverage_and_one_more_would_be_too_much() -> None:
    query, key, _ = (x[0] for x in operands(length=60))
    for coverage in (0.1, 0.3):
        rows = choose_rows(query, key, 0.4, coverage, 6, 10, 1, False)
        assert rows is not None
        layer = window_scores(query, key, 6, 0.4).mean(0)
        mass = (layer / layer.sum()).sort().values
        dropped = 60 - rows.shape[1]
        assert mass[:dropped].sum() < coverage <= mass[: dropped + 1].sum()


@pytest.mark.parametrize(("length", "options"), [(16, {}), (LENGTH, {"coverage": 0.0}), (LENGTH, {"coverage": 1e-9})])
def test_where_nothing_is_left_out_it_is_dense_attention_bitwise(length: int, options: dict[str, Any]) -> None:
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands(1, length)]
    assert torch.equal(run(*inputs, **options), dense(*inputs))
    if not options:
        more = operands(1, length + 1)
        assert not torch.equal(run(*more, coverage=0.9), dense(*more))


def test_given_the_choice_no_row_sees_a_later_one() -> None:
    """The last queries choose, so they are left as they are; a later value then reaches no earlier row."""
    query, key, value = operands(1)
    before = run(query, key, value)
    value[:, :, 30:] += 1
    after = run(query, key, value)
    assert torch.equal(before[:, :, :30], after[:, :, :30])
    assert not torch.equal(before[:, :, 30:], after[:, :, 30:])


LEFT = torch.arange(LENGTH) >= torch.tensor([[0], [7], [30], [40]])  # the third has as many rows as stay, the last none
RIGHT = LEFT.flip(1)


@pytest.mark.parametrize("valid", [LEFT, RIGHT, LEFT & RIGHT.roll(1, 0)], ids=["left", "right", "both"])
@pytest.mark.parametrize("additive", [False, True])
def test_padding_is_no_token(valid: Tensor, additive: bool) -> None:
    inputs = operands(4)
    mask = causal_mask(valid)
    if additive:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    wanted = reference.token_sparse(*inputs, valid, **OPTIONS)
    torch.testing.assert_close(run(*inputs, mask), wanted, rtol=1e-10, atol=1e-10)


def test_what_rows_of_padding_see_does_not_matter() -> None:
    """transformers lets rows that see nothing see everything; other masks hide the rows of padding as well."""
    inputs = operands(3)
    for valid in (LEFT[:3], RIGHT[:3]):
        mask = causal_mask(valid)
        others = [mask & valid[:, None, :, None]]
        if valid[0, -1] and valid[1, -1]:  # where the last row is padding, one that sees everything tells nothing
            others.append(mask | ~mask.any(-1, keepdim=True))
        for other in others:
            assert torch.equal(run(*inputs, other), run(*inputs, mask))


def masks() -> dict[str, Tensor]:
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    hole = causal.clone()
    hole[35, 20] = False
    leak = causal.clone()
    leak[20, 35] = True
    bias = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~causal, -torch.inf)
    bias[30, 3] = 0.5
    packed = causal.clone()
    packed[20:, :20] = False
    found = {"window": causal.triu(-20), "hole": hole, "leak": leak, "bias": bias, "packed": packed}
    found |= {"everything": torch.ones_like(causal), "heads": causal.repeat(4, 1, 1)}
    found["heads"][2] = hole
    return found


@pytest.mark.parametrize("name", masks())
def test_any_other_mask_gives_dense_attention_and_says_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    inputs = operands()
    mask = masks()[name]
    wanted = scaled_dot_product_attention(*inputs, mask, enable_gqa=True)
    torch.testing.assert_close(run(*inputs, mask), wanted, rtol=1e-12, atol=1e-12)
    assert "attention stays dense" in caplog.text


def test_a_causal_mask_of_lower_rank_is_understood() -> None:
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    for mask in (causal, causal[None], causal.expand(2, 4, -1, -1)):
        valid = unpadded(mask)
        assert valid is not None and valid.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    """The same rows as in float64 from the same numbers, and their attention in the lower precision."""
    inputs = [x.to(dtype) for x in operands()]
    wanted = run(*(x.double() for x in inputs))
    got = run(*inputs)
    assert got.dtype == dtype
    assert torch.equal((got != 0).any(-1), (wanted != 0).any(-1))
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=5e-2 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True])
def test_gradients_are_those_of_the_attention_among_the_chosen(grouped: bool) -> None:
    inputs = [x.requires_grad_() for x in operands(2, 15, heads=2, groups=1, width=2, channels=3)]
    small: dict[str, Any] = {"window": 2, "least": 3, "grouped": grouped}
    mask = causal_mask(LEFT[:2, :15])
    assert all((run(*inputs, mask, **small) == 0).all(-1).any(-1).flatten()), "nothing is left out"
    assert torch.autograd.gradcheck(lambda *x: run(*x, mask, **small), inputs)


def test_the_operator_is_registered_as_it_behaves() -> None:
    inputs = [x.requires_grad_() for x in operands()]
    torch.library.opcheck(token_sparse_attention, (*inputs, None, None, *OPTIONS.values()))
    torch.library.opcheck(token_sparse_attention, (*inputs, causal_mask(LEFT[:2]), 0.3, *OPTIONS.values()))


def test_expected_rows() -> None:
    assert [expected_rows(n, 128, 1024) for n in (1000, 1152, 1153, 2304, 16384)] == [1000, 1152, 1152, 1216, 8256]


@pytest.mark.slow
def test_triton_scores_are_the_plain_ones() -> None:
    """In a process of its own: Triton must know from its first import on that it shall interpret."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.backends.kernels.interpret_token_sparse"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == 6
