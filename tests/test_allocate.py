"""Shares that `tokred.calibrate` allocates to the linears of a layer: teal(allocation="greedy")."""

import json

import pytest
import torch
from torch import nn

import tokred
from tests.small_block import GREEDY, batch, measured, small
from tokred.errors import ArgumentError, CalibrationError
from tokred.registry.recipe import parse_recipe

SITES = {
    "qkv": ("q.weight", "k.weight", "v.weight"),
    "out": ("out.weight",),
    "up": ("gate.weight", "up.weight"),
    "down": ("down.weight",),
}
SIZES = {"qkv": 3 * 64, "out": 64, "up": 2 * 128, "down": 128}  # numbers of the weights; all are of one type


def sketches(found):
    by_parameters = {site.parameters: site.sketch for site in found.sites if site.values == "input"}
    return {name: by_parameters[parameters] for name, parameters in SITES.items()}


def block(model, x, shares, found):
    """`Small` with these shares of what its linears read left out."""

    def left(name, values):
        return values if shares[name] == 0 else values * (values.abs() > sketches(found)[name].threshold(shares[name]))

    h = left("qkv", x)
    q, k, v = (linear(h).unsqueeze(1) for linear in (model.q, model.k, model.v))
    x = x + model.out(left("out", nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)))
    h = left("up", x)
    return x + model.down(left("down", nn.functional.silu(model.gate(h)) * model.up(h)))


@torch.no_grad()
def lost(model, shares, found, batches):
    return sum((block(model, x, shares, found) - model(x)).square().sum() for x in batches)


def by_hand(model, found, batches, steps):
    """TEAL's algorithm 1 on this one block: rows of shares after so many steps of a hundredth of the block's bytes."""
    counts = dict.fromkeys(SITES, 0)
    rows = [dict.fromkeys(SITES, 0.0)]
    for _ in range(steps):
        tried = {}
        for name in SITES:
            share = (counts[name] + 1) * 0.01 * sum(SIZES.values()) / SIZES[name]
            if share < 1:
                tried[name] = {**rows[-1], name: share}
        best = min(tried, key=lambda name: lost(model, tried[name], found, batches))
        counts[best] += 1
        rows.append(tried[best])
    return rows


def test_greedy_shares_are_those_of_the_algorithm_by_hand():
    model, batches = small().double(), [batch(0).double(), batch(1)[:2, :5].double()]
    found = tokred.calibrate(model, batches, recipe=GREEDY, progress=False)
    rows = by_hand(model, found, batches, steps=70)
    shares = {site.parameters: site.shares for site in found.sites}
    for name, parameters in SITES.items():
        assert shares[parameters][:71] == pytest.approx([row[name] for row in rows], abs=1e-12)
    assert len(set(rows[-1].values())) > 1 and len(shares["down.weight",]) > 96
    uniform = dict.fromkeys(SITES, 0.5)
    assert lost(model, rows[50], found, batches) < 0.95 * lost(model, uniform, found, batches)

    x = batch(0).double()
    for sparsity, row in ((0.5, rows[50]), (0.305, {name: (rows[30][name] + rows[31][name]) / 2 for name in SITES})):
        torch.compiler.reset()
        recipe = f"teal(sparsity={sparsity}, allocation='greedy', phase='masked')"
        options = {"recipe": recipe, "lower": "eager", "calibration": found, "strict": True}
        with torch.no_grad():
            got, wanted = torch.compile(model, backend="tokred", options=options)(x), block(model, x, row, found)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        assert sum(row[name] * SIZES[name] for name in SITES) == pytest.approx(sparsity * sum(SIZES.values()))


def test_allocated_shares_are_saved_and_checked(tmp_path):
    found = measured(recipe=GREEDY)
    path = found.save(tmp_path / "small.safetensors")
    assert tokred.Calibration.load(path).to_json() == found.to_json()
    path = found.save(tmp_path / "small.json")
    assert tokred.Calibration.load(path).to_json() == found.to_json()
    assert all(site.shares for site in found.sites) and not any(site.shares for site in measured().sites)
    data = json.loads(path.read_text())
    data["sites"][0]["shares"][1] = float("nan")
    path.write_text(json.dumps(data))
    with pytest.raises(CalibrationError, match=r"damaged: ValueError: shares left out lie in \[0, 1\)"):
        tokred.Calibration.load(path)


def test_merged_shares_are_the_mean():
    first, second = measured(seeds=(0, 1), recipe=GREEDY), measured(seeds=(2,), recipe=GREEDY)
    parts = [[site.shares for site in found.sites] for found in (first, second)]
    first.merge(second)
    for site, ours, others in zip(first.sites, *parts, strict=True):
        wanted = [(2 * a + b) / 3 for a, b in zip(ours, others, strict=False)]  # twice as many tokens
        assert site.shares == pytest.approx(wanted)
    with pytest.raises(CalibrationError, match="only one of two calibrations allocated shares to"):
        first.merge(measured(recipe="teal"))


def test_padding_does_not_decide_about_shares():
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    one, other = batch(0), batch(0)
    other[1, 4:] = 50 * batch(1)[1, 4:]  # no earlier token looks there
    found = [
        tokred.calibrate(small(), [{"x": x, "attention_mask": mask}], recipe=GREEDY, progress=False)
        for x in (one, other)
    ]
    assert found[0].to_json() == found[1].to_json()


def test_a_block_that_runs_twice_has_one_allocation():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = small().double()

        def forward(self, x):
            return self.block(self.block(x))

    model, x = Twice().eval(), batch(0).double()
    found = tokred.calibrate(model, [x], recipe=GREEDY, progress=False)
    with torch.no_grad():
        alone = tokred.calibrate(model.block, [x, model.block(x)], recipe=GREEDY, progress=False)
    assert [site.shares for site in found.sites] == [site.shares for site in alone.sites]


def test_arguments_of_an_allocation():
    for recipe, message in (
        ("teal(allocation='even')", "one of 'uniform', 'greedy'"),
        ("teal(allocation='greedy', threshold=0.1)", "give one of"),
    ):
        with pytest.raises(ArgumentError, match=message):
            parse_recipe(recipe)
