"""The benchmark's own models and arithmetic: what is timed must be the method, a ratio what its column says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare, decoder, handwritten, results
from benchmarks.models import MODELS, build, pixels, rebuild
from tests.reference.timm_vit import timm_vit
from tests.reference.tome import ToMe
from tests.reference.vit import vit_classifier

TINY = ["tiny", "tiny_transformers"]


@pytest.mark.parametrize("r", [0, 5, 40])
@pytest.mark.parametrize("name", TINY)
def test_handwritten_tome_equals_oracle(name: str, r: int) -> None:
    model, x = build(name).double(), pixels(name, 3, torch.float64)
    oracle = timm_vit if MODELS[name].library == "timm" else vit_classifier
    with torch.no_grad():
        expected = oracle(getattr(model, "model", model), x, ToMe(r))["logits"]
        got = rebuild(name, model, handwritten.ToMe, r=[r] * MODELS[name].depth)(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TINY)
def test_ideal_has_the_token_counts_of_tome(name: str) -> None:
    """And with nothing removed it is the dense model, bitwise where the spelling is the same."""
    model, x = build(name).double(), pixels(name, 2, torch.float64)
    seen: dict[str, list[int]] = {"ideal": [], "tome": []}
    kinds = {"ideal": handwritten.Ideal, "tome": handwritten.ToMe}
    with torch.no_grad():
        for kind, make in kinds.items():
            hand = rebuild(name, model, make, r=[9] * 4)
            for block in hand.blocks:
                block.fc1.register_forward_hook(lambda module, args, out, kind=kind: seen[kind].append(out.shape[1]))
            hand(x)
        dense = rebuild(name, model, handwritten.Ideal, r=[0] * 4)(x)
        torch.testing.assert_close(dense, model(x), rtol=1e-12, atol=1e-12)
    assert seen["ideal"] == seen["tome"] == [56, 47, 38, 29]


def test_speedup_is_the_median_of_quotients_and_above_one_means_faster() -> None:
    result = compare.Result("tiny", 1, 1, "float32", {})
    result.seconds = {"inductor": [2.0, 40.0, 2.0], "default": [1.0, 10.0, 1.0]}
    assert result.speedup("default", "inductor") == 2.0
    assert result.speedup("inductor", "default") == 0.5


def test_compare_checks_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "sub" / "out.json"
    compare.main(["--model", "tiny", "--r", "3", "--rounds", "4", "--variants", "eager", "--json", str(target)])
    written = json.loads(target.read_text())
    assert len(written["seconds"]["eager"]) == 4
    assert written["speedup"] == {"eager": {"eager": 1.0}}
    assert written["checks"]["handwritten ToMe == oracle"] < 1e-9
    assert "torch" in written["machine"]
    assert "eager" in capsys.readouterr().out
    text = results.comparison(written)
    assert "tiny, batch 8, r=3, float32, 4 rounds." in text
    assert "| eager |" in text


def test_a_wrong_handwritten_model_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handwritten, "removable", lambda r, n: r + 1)
    with pytest.raises(SystemExit, match=r"handwritten ToMe == oracle.*nothing was timed"):
        compare.main(["--model", "tiny", "--r", "3", "--rounds", "1", "--variants", "eager"])


SMALL = ["--width", "64", "--length", "64", "--rounds", "2", "--variants", "eager"]


@pytest.mark.slow
def test_a_decoder_s_ideal_has_the_counts_and_the_numbers_of_free_selection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = torch.compile

    def quick(model: Any, backend: Any, **options: Any) -> Any:
        return compiler(model, backend="eager" if backend == "inductor" else backend, **options)

    monkeypatch.setattr(torch, "compile", quick)
    target = tmp_path / "out.json"
    recipe = ["--layers", "3", "--recipe", "pyramiddrop(layers=[1, 2])"]
    decoder.main([*SMALL, "ideal", *recipe, "--json", str(target)])
    written = json.loads(target.read_text())
    assert written["checks"]["ideal == free"] < 1e-9
    assert "ideal" in written["seconds"], "traced in pieces"
    assert "llama, 3 layers, batch 1, pyramiddrop(layers=[1, 2]), float32, 2 rounds." in results.comparison(written)

    monkeypatch.setattr(decoder, "cuts_of", lambda *_: {1: 34})  # 35, not 34, enter layer 1
    with pytest.raises(SystemExit, match=r"ideal == free.*nothing was timed"):
        decoder.main([*SMALL, "--layers", "2", "--recipe", "pyramiddrop(layers=[1])"])


def test_choosing_is_what_the_method_takes_beyond_free_selection() -> None:
    result = compare.Result("llama", 1, 0, "float32", {})
    result.seconds = {"free": [3.0, 30.0, 3.0], "method": [4.0, 40.0, 4.0]}
    assert result.selection() == pytest.approx(0.25)
    result.seconds.pop("free")
    assert result.selection() is None
