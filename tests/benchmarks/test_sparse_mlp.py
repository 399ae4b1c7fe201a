"""The benchmark of the kernels for active neurons times two programs that compute the same, and writes what it saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import sparse_mlp


@pytest.mark.slow
def test_both_programs_compute_the_same_where_nothing_is_left_out() -> None:
    weights = sparse_mlp.Weights(1, 32, 64, torch.float32)
    with torch.no_grad():
        for share, whole in ((0.0, True), (0.5, False)):
            for name, functions in sparse_mlp.programs(weights, 2, share).items():
                same = torch.allclose(functions["dense"](), functions["sparse"](), atol=1e-5)
                assert same == (whole or name == "down")  # zeros are exact, what is below a threshold is not


@pytest.mark.slow
def test_it_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--width", "32", "--hidden", "64", "--tokens", "1", "--zeros", "0.5", "--rounds", "2"]
    sparse_mlp.main([*sizes, "--json", str(tmp_path / "out.json")])
    down, mlp = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (down["bound"], mlp["bound"]) == (2.0, 1.5)
    assert all(len(row["seconds"][name]) == 2 for row in (down, mlp) for name in ("dense", "sparse"))
    assert len(capsys.readouterr().out.splitlines()) == 3
