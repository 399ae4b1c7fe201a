"""Counts by the elbow, against geometry in plain Python."""

import math

import pytest
import torch

from tokred import Place
from tokred.registry.elbow import elbow, share_with_room
from tokred.registry.prune.corematching import core_matches
from tokred.testing import make_site


def by_geometry(values):
    """The distance of each point of the sorted curve to the line between its ends, in the plane."""
    curve = sorted(values, reverse=True)
    end = complex(len(curve) - 1, curve[-1] - curve[0])
    distances = [abs((complex(i, v - curve[0]) * end.conjugate()).imag) / abs(end or 1) for i, v in enumerate(curve)]
    if max(distances) < 1e-9:
        return len(curve)
    return sum(v > curve[distances.index(max(distances))] for v in curve)


@pytest.mark.parametrize(
    "values, count",
    [
        ([100, 90, 10, 9, 8, 7, 6], 2),
        ([7, 100, 6, 9, 90, 10, 8], 2),  # in any order
        ([5, 5, 5, 1, 1, 1, 1, 1, 1], 3),
        ([9, 8, 3, 3, 3, 2], 2),  # those as high as the elbow are behind it
        ([10, 5.5, 3, 2.5, 0], 1),  # the first of two that are as far
        ([4, 3, 2, 1], 4),
        ([2, 2, 2], 3),
        ([1], 1),
        ([10, 10, 10, 10, 10, 9, 1], 5),  # a knee, as far from the line as an elbow would be
    ],
)
def test_what_lies_before_the_elbow_is_counted(values, count):
    assert by_geometry(values) == count
    assert elbow(torch.tensor([values])).tolist() == [count]
    assert elbow(torch.tensor(values).double() * 1e-6).item() == count  # whatever the units


def test_rows_are_counted_each_by_itself_and_as_geometry_does():
    values = torch.rand(5, 40, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 6
    counts = elbow(values)
    assert counts.shape == (5, 40)
    assert counts.flatten().tolist() == [by_geometry(row) for row in values.flatten(0, 1).tolist()]
    assert counts.unique().numel() > 5


def test_an_elbow_is_traced():
    values = torch.randint(0, 50, (4, 30), generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(elbow, backend="aot_eager", fullgraph=True)
    assert compiled(values).tolist() == elbow(values).tolist()
    torch.compiler.reset()


@pytest.mark.parametrize(
    "counts, whole, buckets, share",
    [([3, 7], 16, 8, 0.5), ([8], 16, 8, 0.5), ([9], 16, 8, 0.625), ([0], 16, 4, 0.25), ([576, 2], 576, 8, 1.0)],
)
def test_the_share_has_room_for_the_largest_count(counts, whole, buckets, share):
    assert share_with_room(torch.tensor(counts), whole, buckets) == share


@pytest.mark.parametrize("counts", [[17], [-1, 3]])
def test_counts_that_cannot_be_are_errors(counts):
    with pytest.raises(ValueError, match="of 16 tokens"):
        share_with_room(torch.tensor(counts), 16)


def test_core_neurons_are_those_that_most_real_tokens_fire():
    site = make_site(Place(layer=6, depth=12, tokens=29, span=12, whole=12), dtype=torch.float64, padded=True)
    neurons = site.neurons.clamp(min=0)  # a neuron that is exactly zero does not fire
    found = core_matches(neurons, site.valid, 0.3)
    width = neurons.shape[-1]
    for sample in range(3):
        fires = (neurons[sample] > 0).tolist()
        often = [sum(row[n] for row, real in zip(fires, site.valid[sample], strict=True) if real) for n in range(width)]
        core = sorted(range(width), key=lambda n: (-often[n], n))[: math.ceil(0.3 * width)]
        assert found[sample].tolist() == [sum(row[n] for n in core) for row in fires]
