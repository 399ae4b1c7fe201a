"""The methods that tests/reference has no oracle for (random, norm, pool, tomesd), against plain loops in float64."""

from math import ceil

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d, scaled_dot_product_attention

from tokred import Place
from tokred.registry.recipe import parse_recipe
from tokred.testing import TinyViT, compiled, make_site

EXACT = {"rtol": 0, "atol": 1e-10}
VIT = Place(layer=1, depth=3, tokens=37, head=1, grid=(6, 6))
ENDS = Place(layer=2, depth=4, tokens=24, head=2, tail=1)


def method(recipe):
    return parse_recipe(recipe).methods[0]


def site(place, **options):
    return make_site(place, dtype=torch.float64, **options)


@pytest.mark.parametrize("place", [VIT, ENDS])
def test_norm_keeps_the_longest_rows_in_order(place):
    here = site(place)
    index = method("norm(keep=0.3)").plan(here).index
    free = range(place.head, place.tokens - place.tail)
    for b in range(3):
        ranked = sorted(free, key=lambda row: -here.hidden[b, row].norm().item())
        kept = sorted(ranked[: place.count(0.3)])
        assert index[b].tolist() == [*range(place.head), *kept, *range(place.tokens - place.tail, place.tokens)]


@pytest.mark.parametrize("recipe", ["norm(keep=0.5)", "random(keep=0.5)"])
def test_padding_goes_first(recipe):
    here = site(ENDS, padded=True)
    kept = method(recipe).plan(here)
    gone = int((~here.valid[1, ENDS.head : -ENDS.tail]).sum())
    assert gone == 5
    assert kept.pick(here.valid.unsqueeze(-1))[1, ENDS.head : -ENDS.tail].all()


def test_padding_goes_before_the_lowest_scores():
    here = site(ENDS, padded=True)
    kept = here.keep_top(-here.arange(1, 25).double(), 16)
    assert kept.index[1].tolist() == [0, 1, *range(2, 18), 23]
    last = here.keep_top(here.arange(1, 25).double() - 100, 3)
    assert last.index[1].tolist() == [0, 1, 15, 16, 17, 23]
    assert last.index[0].tolist() == [0, 1, 20, 21, 22, 23]


def test_random_is_one_draw_for_all_samples_that_seed_and_layer_change():
    def rows(recipe, layer=1, batch=3):
        place = Place(layer=layer, depth=12, tokens=197, head=1)
        return method(recipe).plan(site(place, batch=batch)).index

    base = rows("random(keep=0.5)")
    assert base.shape == (3, 99)
    assert (base == base[:1]).all()
    assert torch.equal(base[:1], rows("random(keep=0.5)", batch=1))
    assert not torch.equal(base, rows("random(keep=0.5, seed=1)"))
    assert not torch.equal(base, rows("random(keep=0.5)", layer=2))


def test_pool_on_a_grid_is_average_pooling():
    here = site(VIT)
    token_map = method("pool(keep=0.25)").plan(here)
    image = here.hidden[:, 1:].transpose(1, 2).unflatten(-1, (6, 6))
    expected = adaptive_avg_pool2d(image, (3, 3)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(token_map.reduce(here.hidden)[:, 1:], expected, **EXACT)
    assert token_map.size[:, 1:].eq(4).all()


def test_pool_without_a_grid_averages_runs_by_size():
    here = site(ENDS, sized=True)
    y = method("pool(keep=0.3)").plan(here).reduce(here.hidden)
    kept, n = 7, 21
    assert y.shape[1] == kept + 3
    for b in range(3):
        for slot in range(kept):
            members = [ENDS.head + i for i in range(n) if i * kept // n == slot]
            weight = here.size[b, members, None]
            mean = (here.hidden[b, members] * weight).sum(0) / weight.sum()
            torch.testing.assert_close(y[b, ENDS.head + slot], mean, **EXACT)


def merged_cells(x, head, grid, r, sx, sy, chosen):
    """tomesd's groups of one sample [N C] by loops: lists of rows, the destination first."""
    rows, columns = grid
    cells = [(i, j) for i in range(rows // sy) for j in range(columns // sx)]
    dst = [head + (i * sy + k // sx) * columns + j * sx + k % sx for (i, j), k in zip(cells, chosen, strict=True)]
    src = [row for row in range(head, head + rows * columns) if row not in dst]
    unit = x / x.norm(dim=-1, keepdim=True)
    edges = []
    for row in src:
        scores = [(unit[row] @ unit[j]).item() for j in dst]
        edges.append((max(scores), row, dst[scores.index(max(scores))]))
    edges.sort(key=lambda edge: -edge[0])
    groups = {j: [j] for j in dst}
    for _, row, j in edges[:r]:
        groups[j].append(row)
    return list(groups.values()) + [[row] for _, row, _ in edges[r:]] + [[row] for row in range(head)]


@pytest.mark.parametrize(
    "recipe, r, sx, sy, grid",
    [
        ("tomesd(ratio=0.5, use_rand=False)", 18, 2, 2, (6, 6)),
        ("tomesd(ratio=0.9, sx=3, sy=2, use_rand=False)", 31, 3, 2, (5, 7)),
        ("tomesd(ratio=0.6, seed=4)", 21, 2, 2, (5, 7)),
    ],
)
def test_tomesd_merges_the_most_similar_into_one_token_of_each_cell(recipe, r, sx, sy, grid):
    place = Place(layer=0, depth=2, tokens=1 + grid[0] * grid[1], head=1, grid=grid)
    here = site(place)
    token_map = method(recipe).plan(here)
    y, groups = token_map.reduce(here.hidden), token_map.groups(place.tokens)
    assert y.shape[1] == place.tokens - r
    chosen = [0] * ((grid[0] // sy) * (grid[1] // sx))
    if "seed" in recipe:  # which token of a cell stays is read from the map; that it is one of each cell is checked
        chosen = cell_choices(token_map, grid, sx, sy)
    for b in range(3):
        expected = merged_cells(here.hidden[b], 1, grid, r, sx, sy, chosen)
        assert len(expected) == y.shape[1]
        for group in expected:
            (slot,) = set(groups[b, group].tolist())
            torch.testing.assert_close(y[b, slot], here.hidden[b, group].mean(0), **EXACT)


def cell_choices(token_map, grid, sx, sy):
    """The place in its cell of each destination: the last rows that the map keeps."""
    count = (grid[0] // sy) * (grid[1] // sx)
    dst = (token_map.keep[0, -count:] - 1).tolist()
    cells = [(row // grid[1] // sy, row % grid[1] // sx) for row in dst]
    assert cells == [(i, j) for i in range(grid[0] // sy) for j in range(grid[1] // sx)]
    chosen = [row // grid[1] % sy * sx + row % grid[1] % sx for row in dst]
    assert len(set(chosen)) > 1
    return chosen


def test_tomesd_in_a_model_is_a_round_trip_around_each_attention():
    torch.manual_seed(0)
    model = TinyViT().double().eval()
    pixels = torch.randn(2, 3, 12, 12).double()
    function, run = compiled(model, method("tomesd(ratio=0.5, use_rand=False)"))
    with torch.no_grad():
        got = function(pixels)
        x = model.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([model.first.expand(2, -1, -1), x], 1) + model.places
        for block in model.blocks:
            normed = block.norm1(x)
            groups = [merged_cells(sample, 1, (6, 6), 18, 2, 2, [0] * 9) for sample in normed]
            short = torch.stack([torch.stack([s[g].mean(0) for g in gs]) for s, gs in zip(normed, groups, strict=True)])
            qkv = block.qkv(short).view(2, 19, 3, 4, 8).permute(2, 0, 3, 1, 4)
            y = block.out(scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
            for b in range(2):
                for slot, group in enumerate(groups[b]):
                    x[b, group] = x[b, group] + y[b, slot]
            x = x + block.mlp(block.norm2(x))
        x = model.norm(x)
    assert [applied.after for applied in run.applied] == [19, 19, 19]
    torch.testing.assert_close(got["tokens"], x, **EXACT)
    torch.testing.assert_close(got["logits"], model.head(x[:, 0]), **EXACT)


def test_tokens_pruned_in_several_layers_keep_their_last_value():
    torch.manual_seed(0)
    model = TinyViT().double().eval()
    pixels = torch.randn(2, 3, 12, 12).double()
    function, run = compiled(model, method("norm(keep=0.5, layers=[0, 1, 2])"))
    with torch.no_grad():
        got = function(pixels)
        x = model.patch(pixels).flatten(2).transpose(1, 2)
        full = torch.cat([model.first.expand(2, -1, -1), x], 1) + model.places  # [B 37 C] the last value of each token
        alive = torch.arange(37).expand(2, -1)
        for block in model.blocks:
            x = torch.stack([full[b, alive[b]] for b in range(2)])
            qkv = block.qkv(block.norm1(x)).view(2, x.shape[1], 3, 4, 8).permute(2, 0, 3, 1, 4)
            x = x + block.out(scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
            for b in range(2):
                full[b, alive[b]] = x[b]
            longest = [sorted(range(1, x.shape[1]), key=lambda i, b=b: -x[b, i].norm().item()) for b in range(2)]
            kept = [order[: ceil((x.shape[1] - 1) / 2)] for order in longest]
            rows = torch.tensor([[0, *sorted(row)] for row in kept])
            alive = alive.gather(1, rows)
            for b in range(2):
                y = full[b, alive[b]]
                full[b, alive[b]] = y + block.mlp(block.norm2(y))
        expected = model.norm(full)
    assert [applied.after for applied in run.applied] == [19, 10, 6]
    torch.testing.assert_close(got["tokens"], expected, **EXACT)
    torch.testing.assert_close(got["logits"], model.head(expected[:, 0]), **EXACT)
