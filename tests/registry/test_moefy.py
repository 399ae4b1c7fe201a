"""moefy's blocks: equal, found again where there are any, the same in each run."""

import pytest
import torch
from torch.nn.functional import normalize

import tokred
from tokred.errors import ArgumentError
from tokred.registry.recipe import parse_recipe
from tokred.registry.sparsify.moefy import Moefy, assigned, balanced_clusters


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_clusters_that_are_there_are_found():
    centres, labels = torch.eye(16)[:5], torch.arange(5).repeat(8)
    found = balanced_clusters(normalize(centres[labels] + 0.1 * normal(40, 16), dim=1), 5, rounds=20, seed=3)
    assert all(len(found[labels == number].unique()) == 1 for number in range(5))
    assert len(found.unique()) == 5


@pytest.mark.parametrize("size, count", [(40, 5), (41, 5), (44, 5), (7, 7), (9, 2)])
def test_clusters_are_equal_and_the_same_in_each_run(size, count):
    points = normalize(normal(size, 6), dim=1)
    points[: size // 2] = points[0]  # as many as like cannot be in one place
    labels = balanced_clusters(points, count, rounds=20, seed=0)
    sizes = labels.bincount(minlength=count)
    assert sizes.sum() == size and sizes.max() - sizes.min() <= 1
    assert torch.equal(labels, balanced_clusters(points, count, rounds=20, seed=0))


def test_a_full_cluster_takes_the_most_similar():
    similarity = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.7, 0.2], [0.6, 0.5]])
    assert assigned(similarity, torch.tensor([2, 2])).tolist() == [0, 0, 1, 1]
    assert assigned(similarity, torch.tensor([1, 3])).tolist() == [0, 1, 1, 1]


def test_rounds_of_k_means_bring_points_nearer():
    points = normalize(normal(96, 12), dim=1)

    def nearness(rounds):
        labels = balanced_clusters(points, 8, rounds, seed=0)
        return sum(points[labels == n].mean(0).norm() * (labels == n).sum() for n in range(8))

    assert nearness(20) > 1.04 * nearness(0)


def test_a_gate_chooses_and_both_weights_make_the_blocks():
    gate, up = normal(24, 8), normal(24, 8, seed=1)
    method = Moefy(neurons=6)
    labels, centres = method.prepare(gate, up)
    unit = normalize(gate, dim=1)
    for number in range(4):
        torch.testing.assert_close(centres[number], normalize(unit[labels == number].mean(0), dim=0))
    assert not torch.equal(labels, method.prepare(gate)[0])
    assert centres.dtype == torch.float32 and method.prepare(gate.double())[1].dtype == torch.float64


def test_each_token_computes_the_blocks_nearest_to_it():
    method, x, values = Moefy(sparsity=0.7, neurons=3), normal(2, 5, 8), normal(2, 5, 12, seed=2)
    labels, centres = method.prepare(normal(12, 8, seed=1))
    left = method.blocks_masked(values, x, labels, centres)
    for token, before, after in zip(x.view(-1, 8), values.view(-1, 12), left.view(-1, 12), strict=True):
        nearest = (centres @ token).argmax()  # one of four blocks stays
        assert torch.equal(after, torch.where(labels == nearest, before, 0.0))
    whole = Moefy(sparsity=0, neurons=3)
    assert torch.equal(whole.blocks_masked(values, x, *whole.prepare(normal(12, 8, seed=1))), values)


def test_how_many_blocks():
    place = tokred.Neurons(0, 1, "", "down", 100)
    for recipe, blocks, left in (
        ("moefy", 4, 2),
        ("moefy(sparsity=0.01)", 4, 3),
        ("moefy(sparsity=0.99)", 4, 1),
        ("moefy(neurons=1000)", 2, 1),
        ("moefy(sparsity=0, neurons=10)", 10, 10),
        ("moefy(sparsity=0.3, neurons=10)", 10, 7),
    ):
        method = parse_recipe(recipe).methods[0]
        assert (method.blocks(100), method.left(100)) == (blocks, left)
        assert method.idle(place) == (blocks == left)


@pytest.mark.parametrize("recipe", ["moefy(sparsity=1)", "moefy(neurons=0)", "moefy(rounds=-1)", "moefy(seed=0.5)"])
def test_arguments(recipe):
    with pytest.raises(ArgumentError):
        parse_recipe(recipe)
