"""tokred::greedy_diverse chooses what its reference does: on CPU, compiled, exported, and as an interpreted kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokred.backends.kernels.greedy import OBJECTIVES, greedy_diverse, reference

ROOT = Path(__file__).resolve().parents[3]
KINDS = ("random", "signs", "copies")


def rows(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[B N D] random; "signs" has many equal cosines, "copies" many equal rows, whose cosines differ by rounding."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "signs":
        features = features.sign()
    if kind == "copies":
        features = features[:, torch.randint(0, max(shape[1] // 3, 1), (shape[1],), generator=generator)]
    return features.to(dtype)


def arguments(
    objective: str, shape: tuple[int, int, int], dtype: torch.dtype, kind: str, how: str, count: int
) -> tuple[Any, ...]:
    """All arguments of the operator. how: "plain", or with a "score", a "first" row, padding ("among"), or "all"."""
    features = rows(kind, shape, dtype)
    generator = torch.Generator().manual_seed(1)
    score = torch.rand(shape[:2], generator=generator, dtype=torch.float64).to(dtype)
    first = torch.randint(0, shape[1], shape[:1], generator=generator)
    among = torch.rand(shape[:2], generator=generator) < 0.7
    return (
        features,
        count,
        objective,
        score if how in ("score", "all") and objective != "sum" else None,
        first if how in ("first", "all") else None,
        among if how in ("among", "all") else None,
    )


SHAPES = ((1, 1, 4), (3, 15, 16), (2, 33, 8))
CASES = [
    (objective, shape, dtype, kind, how, count)
    for objective, shape, dtype, kind, how in product(
        OBJECTIVES,
        SHAPES,
        (torch.float32, torch.bfloat16, torch.float64),
        KINDS,
        ("plain", "score", "first", "among", "all"),
    )
    for count in sorted({0, 1, shape[1] // 4, shape[1]})
]


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_chooses_what_the_reference_does(objective: str, kind: str) -> None:
    cases = [case for case in CASES if (case[0], case[3]) == (objective, kind)]
    assert len(cases) > 100
    for case in cases:
        given = arguments(*case)
        chosen = greedy_diverse(*given)
        assert chosen.dtype == torch.int64
        assert torch.equal(chosen, reference(*given)), case
        assert all(len(set(sample)) == case[-1] for sample in chosen.tolist()), case


def test_equal_rows_are_chosen_from_the_front() -> None:
    one = torch.randn(1, 1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features = torch.cat([one, -one, one * 3, -one * 0.3, one], 1)
    assert greedy_diverse(features, 5, "sum").tolist() == [[0, 1, 2, 3, 4]]
    assert greedy_diverse(features, 3, "max", None, torch.tensor([4])).tolist() == [[4, 1, 0]]
    assert greedy_diverse(features, 3, "cover").tolist() == [[0, 1, 2]]


def test_what_no_cosine_can_be_taken_of_is_a_row_like_any_other() -> None:
    features = torch.randn(2, 6, 4)
    features[0, 2], features[0, 4], features[1, 1, 0] = 0.0, torch.nan, torch.inf
    score = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf, 0.0, 2.0]] * 2)
    for objective, given in (("sum", None), ("max", score), ("cover", score)):
        for chosen in greedy_diverse(features, 6, objective, given).tolist():
            assert sorted(chosen) == list(range(6)), objective


@pytest.mark.parametrize(
    "change, message",
    [
        ({"objective": "far"}, "objective 'far' is none of sum, max, cover"),
        ({"objective": "sum", "score": torch.ones(2, 5)}, 'objective "sum" takes no score'),
        ({"count": 6}, "6 of 5 rows"),
        ({"count": -1}, "-1 of 5 rows"),
    ],
)
def test_wrong_arguments_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        greedy_diverse(**{"features": torch.randn(2, 5, 4), "count": 2, "objective": "max"} | change)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_is_a_sound_operator(objective: str) -> None:
    given = arguments(objective, (2, 12, 8), torch.float32, "random", "all", 4)
    torch.library.opcheck(torch.ops.tokred.greedy_diverse.default, given)


class Chosen(torch.nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return greedy_diverse(features * 2, features.shape[1] // 4, "max", features.norm(dim=-1)) + 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_is_one_node_of_a_compiled_graph(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(Chosen(), backend=backend, fullgraph=True, dynamic=True)
    for shape in ((2, 20, 8), (3, 29, 8)):
        features = rows("random", shape, torch.float32)
        assert torch.equal(compiled(features), Chosen()(features))
    torch.compiler.reset()


def test_it_is_exported() -> None:
    program = torch.export.export(Chosen(), (rows("random", (2, 20, 8), torch.float32),))
    calls = [str(node.target) for node in program.graph.nodes if "greedy" in str(node.target)]
    assert calls == ["tokred.greedy_diverse.default"]
    features = rows("random", (2, 20, 8), torch.float32, seed=5)
    assert torch.equal(program.module()(features), Chosen()(features))


INTERPRETED = """
import sys, torch
from tokred.backends.kernels.greedy import prepared, similarities
from tokred.backends.kernels.greedy_triton import launch
results = []
for features, count, objective, score, first, among in torch.load(sys.argv[1]):
    unit, score, ceiling = prepared(features, objective, score, among)
    results.append(launch(similarities(unit, ceiling), score, ceiling, count, objective, first))
torch.save(results, sys.argv[2])
"""


@pytest.mark.slow
def test_the_interpreted_triton_kernel_chooses_what_the_reference_does(tmp_path: Path) -> None:
    """In a process of its own: triton decides at import whether what it decorates is interpreted."""
    dtypes, hows = (torch.float32, torch.float64), ("plain", "score", "first", "among")
    small = product(OBJECTIVES, [(2, 9, 4)], dtypes, KINDS, hows, (1, 4, 9))
    wanted = [arguments(*case) for number, case in enumerate(small) if number % 5 == 0]
    torch.save(wanted, tmp_path / "cases.pt")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(tmp_path / "cases.pt"), str(tmp_path / "results.pt")],
        check=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    results = torch.load(tmp_path / "results.pt")
    assert len(results) == len(wanted) > 40
    for given, chosen in zip(wanted, results, strict=True):
        assert torch.equal(chosen, reference(*given)), given[1:]
