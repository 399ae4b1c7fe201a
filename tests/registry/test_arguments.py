"""The methods' arguments: how many tokens each removes, and every value that is refused."""

import pytest

from tokred import Place
from tokred.errors import ArgumentError
from tokred.registry.recipe import parse_recipe


def method(recipe):
    return parse_recipe(recipe).methods[0]


def place(tokens=197, head=1, tail=0, grid=(14, 14), layer=3, depth=12):
    return Place(layer=layer, depth=depth, tokens=tokens, head=head, tail=tail, grid=grid)


COUNTS = [
    ("random(keep=0.5)", place(), 98),
    ("random", place(tokens=22), 10),  # 21 free: 11 stay
    ("norm(ratio=0.3)", place(), 58),  # ceil(0.7 * 196) = 138 stay
    ("norm(keep=1)", place(), 0),
    ("norm(keep=0.0001)", place(), 195),
    ("evit", place(), 57),  # 138 kept and one fused
    ("evit(fuse=False)", place(), 58),
    ("evit(keep=0.995)", place(), 0),
    ("evit(keep=0.99)", place(), 0),  # one would be dropped, and fused with itself
    ("evit(keep=0.99, fuse=False)", place(), 1),
    ("pool(keep=0.25)", place(), 147),  # 7 x 7
    ("pool(keep=0.5)", place(), 96),  # 10 x 10
    ("pool(keep=0.5)", place(grid=None), 98),
    ("pool(ratio=0)", place(grid=(5, 9), tokens=46), 0),
    ("pool(ratio=0)", place(grid=None), 0),
    ("tome(r=13)", place(), 13),
    ("tome(r=500)", place(), 98),
    ("tome(r=[1, 2])", place(layer=1), 2),
    ("tome(r=[1, 2])", place(layer=2), 0),
    ("tofu(r=(8, 1.0))", place(layer=0), 0),
    ("tofu(r=(8, 1.0))", place(layer=11), 16),
    ("tofu(r=(8, -1.0))", place(layer=0), 16),
    ("tofu(r=9)", place(tokens=12, head=2, tail=1), 4),
    ("pitome", place(), 19),  # floor(196 - 176.4)
    ("pitome(ratio=0.28)", place(tokens=101), 28),  # 100 - 72.0000...
    ("pitome(keep=0.1)", place(), 98),
    ("pitome(keep=[0.5, 1, 0.9])", place(layer=2), 19),
    ("pitome(keep=[0.5])", place(), 0),
    ("pitome(ratio=[0, 0, 0, 0.25])", place(), 49),
    ("expedit(3, (7, 7))", place(), 147),
    ("expedit(grid=[14, 14])", place(), 0),
    ("expedit(keep=0.5)", place(), 96),
    ("expedit", place(), 147),
    ("expedit(ratio=0)", place(), 0),
    ("tomesd", place(tokens=196, head=0), 98),
    ("tomesd(ratio=0.9)", place(tokens=196, head=0), 147),
    ("tomesd(ratio=0.9, sx=1, sy=1)", place(tokens=196, head=0), 0),
    ("tomesd(merge_attn=False)", place(), 0),
    ("tomesd(ratio=0.99)", place(tokens=35, head=0, grid=(5, 7)), 29),  # 2 x 3 whole cells
]


def visual(layer, span=576, depth=32, whole=576):
    return Place(layer=layer, depth=depth, tokens=span + 60, span=span, whole=whole)


COUNTS += [
    ("sparsevlm", visual(3), 276),
    ("sparsevlm", visual(7, span=300), 100),
    ("sparsevlm", visual(16, span=200), 90),
    ("sparsevlm(keep=[0.5, 0], layers=[4, 9])", visual(9, span=288), 288),
    ("hidrop", visual(0), 576),
    ("hidrop", visual(9), 0),  # all are back
    ("hidrop", visual(10), 288),
    ("hidrop", visual(18, span=36), 18),
    ("hidrop", visual(25, span=18), 18),
    ("hidrop(keep=[0.5, 0.25], layers=[4, 9])", visual(9, span=288), 144),
    ("aim", visual(0, depth=28), 432),
    ("aim", visual(0, depth=28, span=577, whole=577), 432),  # 289, then 145 stay
    ("aim", visual(15, depth=28, span=144), 18),
    ("aim", visual(22, depth=28, span=18), 18),
    ("aim(keep=0.5)", visual(0), 288),
    ("visionzip", visual(0), 512),  # 64 stay
    ("visionzip(keep=0.0113)", visual(0), 569),  # round(6.5088)
    ("corematching", visual(6), 432),
    ("corematching(keep=0.0113)", visual(6), 569),
    ("zoo_prune", visual(0), 512),
    ("todre", visual(0), 518),  # round(57.6)
    ("todre", visual(28, span=58), 58),
    ("elastic_pool", visual(0), 432),
    ("elastic_pool(tokens=64)", visual(0), 512),
    ("elastic_pool(tokens=900)", visual(0), 0),
]


@pytest.mark.parametrize("recipe, where, removed", COUNTS)
def test_removed(recipe, where, removed):
    assert method(recipe).removed(where) == removed


SHARES = [
    "{}(keep=0)",
    "{}(keep=1.1)",
    "{}(keep=-0.5)",
    "{}(keep='half')",
    "{}(keep=True)",
    "{}(ratio=1)",
    "{}(ratio=-0.1)",
    "{}(ratio=True)",
    "{}(keep=0.5, ratio=0.5)",
]
OTHERS = [
    "random(seed=0.5)",
    "random(seed=True)",
    "evit(fuse=1)",
    "tome(r=-1)",
    "tome(r=1.5)",
    "tome(r=True)",
    "tome(r=[1, -1])",
    "tome(r=(8,))",
    "tome(r=(8, 2))",
    "tome(r=(8, 'x'))",
    "tome(r=(-8, 0.5))",
    "tome(r='all')",
    "tome(r=None)",
    "tome(order='random')",
    "tofu(r=-1)",
    "pitome(keep=[0.5, 0])",
    "pitome(ratio=[0.5, 1])",
    "pitome(prop_attn=1)",
    "tome(prop_attn='yes')",
    "expedit(layer='last')",
    "expedit(layer=1, layers=[2])",
    "expedit(grid=7)",
    "expedit(grid=(7,))",
    "expedit(grid=(7, 0))",
    "expedit(grid=(7, 7.0))",
    "expedit(grid=(7, 7), keep=0.5)",
    "expedit(iterations=0)",
    "expedit(window=0)",
    "expedit(top_k=-1)",
    "expedit(tau=0)",
    "expedit(tau='x')",
    "tomesd(ratio=1)",
    "tomesd(ratio=None)",
    "tomesd(sx=0)",
    "tomesd(sy=1.5)",
    "tomesd(use_rand=1)",
    "tomesd(merge_attn=None)",
    "tomesd(seed='x')",
    "todre(exit=0)",
    "todre(exit=True)",
    "todre(exit='late')",
    "todre(layer=-1)",
    "todre(pivot='random')",
    "zoo_prune(keep=0)",
    "zoo_prune(probes=-1)",
    "zoo_prune(probes=6.4)",
    "zoo_prune(step=0)",
    "zoo_prune(step=True)",
    "zoo_prune(seed=0.5)",
    "catp(weight=-1)",
    "catp(weight=True)",
    "catp(ratio=1)",
    "cats(sparsity=0.5, threshold=0.1)",
    "cats(threshold=-0.1)",
    "cats(threshold='x')",
    "cats(threshold=True)",
    "cats(phase='prefill')",
    "random_neurons(seed=0.5)",
    "random_neurons(phase=None)",
    "elastic_pool(tokens=0)",
    "elastic_pool(tokens=8)",
    "elastic_pool(tokens=4, keep=0.5)",
    "visionzip(contextual=1.5)",
    "visionzip(contextual='all')",
    "corematching(core=0)",
    "corematching(core=True)",
    "corematching(layer=0)",
]
OTHERS += [
    f"{name}(sparsity={value})" for name in ("cats", "teal", "random_neurons") for value in (1, -0.1, True, "'x'")
]
OTHERS += [
    f"{name}(keep={keep})"
    for name in ("sparsevlm", "hidrop", "aim")
    for keep in ("[]", "'x'", "[0.5, 0.7, 0.8]", "1.5", "[True]", "[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]")
]
OTHERS += [
    "sparsevlm(layers=[3, 3], keep=[0.5, 0.2])",
    "sparsevlm(layers='3:5', keep=[0.5, 0.2])",
    "sparsevlm(layers=[3])",
    "hidrop(keep=[0, 0.5, 0.2])",
    "aim(keep=[0.3, 0.2])",
    "aim(keep=[0])",
]
WRONG = [share.format(name) for name in ("random", "norm", "pool", "evit", "pitome", "expedit") for share in SHARES]


@pytest.mark.parametrize("recipe", WRONG + OTHERS)
def test_a_value_out_of_range_is_refused_and_named(recipe):
    with pytest.raises(ArgumentError) as caught:
        method(recipe)
    name, _, rest = recipe.partition("(")
    option = rest.partition("=")[0]
    assert str(caught.value).startswith(f"{name}({option}=") or f"{option}=" in str(caught.value)


REFUSED = [
    ("expedit(grid=(7, 15))", place(), "the patches' grid is (14, 14), which is no finer"),
    ("tomesd(sx=15)", place(), "one cell is larger than the grid (14, 14)"),
]


LAYERS = [("sparsevlm", 32, [3, 7, 16]), ("aim", 28, [0, *range(15, 23)]), ("hidrop", 32, [0, 9, 10, 14, 16, 18, 25])]
LAYERS += [("adaptinfer", 32, [2, 11, 21]), ("pyramiddrop", 32, [8, 16, 24]), ("corematching", 32, [6])]
LAYERS += [("fastv", 32, [2]), ("todre", 32, [0, 28]), ("zoo_prune", 32, [0]), ("visionzip", 32, [0])]
LAYERS += [("elastic_pool", 32, [0]), ("sparsevlm", 8, [1, 2, 4]), ("corematching", 4, [3])]


@pytest.mark.parametrize("name, depth, layers", LAYERS)
def test_the_layers_are_the_paper_s(name, depth, layers):
    assert method(name).default_layers(depth) == layers


@pytest.mark.parametrize("depth", range(1, 34))
@pytest.mark.parametrize("name", ["sparsevlm", "hidrop", "aim"])
def test_a_schedule_fits_a_model_of_any_depth(name, depth):
    steps, shares = method(name).steps(depth), method(name).shares
    assert steps == sorted(steps)
    assert len(steps) == len(shares)
    assert all(0 <= step < depth for step in steps)
    if name == "hidrop" and depth > 2:
        (enter,) = [layer for layer in range(depth) if method(name).restores(layer, depth)]
        assert enter > 0
        assert method(name).needs_at(enter, depth) == ("visual",)


@pytest.mark.parametrize("recipe, where, message", REFUSED)
def test_a_place_that_does_not_fit_is_refused(recipe, where, message):
    with pytest.raises(ArgumentError) as caught:
        method(recipe).removed(where)
    assert message in str(caught.value)
