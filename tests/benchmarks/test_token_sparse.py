"""The benchmark of token_sparse_attention runs, and says what was left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import token_sparse


def test_it_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--heads", "2", "--groups", "1", "--width", "16", "--tokens", "1100", "1300", "--rounds", "2"]
    token_sparse.main([*sizes, "--json", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    found = {(each["kind"], each["tokens"]): each for each in written["results"]}
    assert found["peaked", 1100]["realised"]["sparse"] == {"share": 1.0, "mass": 1.0}  # too short
    assert found["peaked", 1300]["realised"]["sparse"]["share"] < 1
    assert all(len(each["seconds"]["dense"]) == 2 for each in found.values())
    assert written["pays_from"] > 1153
    assert "nothing is left out of fewer than 1153 tokens" in capsys.readouterr().out
