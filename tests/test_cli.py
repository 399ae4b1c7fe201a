"""The command line: what it prints, and that bad usage ends with 2 and one sentence, never a traceback."""

import json
import sys

import pytest
import torch
from torch import nn

import tokred
from tokred.bench import interleaved
from tokred.cli import load_target, main
from tokred.errors import OptionError

TINY = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.qkv, self.head = 2, nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x, scale=1.0):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        return self.head((x + scale * y)[:, 0])

def build(batch=2):
    torch.manual_seed(0)
    return Tiny(), (torch.randn(batch, 17, 16),), {"scale": 0.5}

def no_batch():
    return Tiny(), torch.randn(2, 17, 16)

def wrong():
    return Tiny()
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    (tmp_path / "tiny_target.py").write_text(TINY)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "tiny_target", raising=False)
    return "tiny_target"


def _bad(capsys, *argv):
    """The sentence on stderr of a command that must end with 2 and print nothing else."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tokred: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_methods_lists_every_method_with_its_arguments(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for name, method in tokred.methods().items():
        assert name in out
        assert method.kind in out
    assert "layers=None" in out


def test_explain_prints_the_report(capsys, tiny):
    assert main(["explain", f"{tiny}:build", "--recipe", "norm(keep=0.5)"]) == 0
    out = capsys.readouterr().out
    assert "attention" in out
    assert "17" in out


def test_explain_prints_json_and_writes_html(capsys, tiny, tmp_path):
    page = tmp_path / "deep" / "report.html"
    assert main(["explain", f"{tiny}:build", "--recipe", "norm(keep=0.5)", "--json", "--html", str(page)]) == 0
    captured = capsys.readouterr()
    (block,) = [each for each in json.loads(captured.out)["graphs"][0]["blocks"] if each["kind"] == "attention"]
    assert block["tokens"][0] == 17
    assert page.read_text().lstrip().lower().startswith("<!doctype html")
    assert str(page) in captured.err


def test_explain_takes_options_of_the_backend(capsys, tiny):
    assert main(["explain", f"{tiny}:build", "--option", "exact=False", "--option", "lower=eager"]) == 0
    assert "canonical_attention" not in capsys.readouterr().out
    assert "'exact'" in _bad(capsys, "explain", f"{tiny}:build", "--option", "exakt=False")
    assert "NAME=VALUE" in _bad(capsys, "explain", f"{tiny}:build", "--option", "exact")


def test_explain_without_a_recipe_runs_the_exact_passes(capsys, tiny):
    assert main(["explain", f"{tiny}:build"]) == 0
    assert "norm" not in capsys.readouterr().out


def test_an_unknown_method_names_the_nearest(capsys, tiny):
    assert "'tome'" in _bad(capsys, "explain", f"{tiny}:build", "--recipe", "tomee(r=4)")


def test_an_argument_out_of_range_is_bad_usage(capsys, tiny):
    assert "1.5" in _bad(capsys, "explain", f"{tiny}:build", "--recipe", "norm(keep=1.5)")


@pytest.mark.parametrize(
    "spec, words",
    [
        ("nothing", "module:callable"),
        ("tiny_target:", "module:callable"),
        ("no_such_module_at_all:build", "cannot import 'no_such_module_at_all'"),
        ("tiny_target:biuld", "Did you mean 'build'?"),
        ("tiny_target:wrong", "must return (model, args) or (model, args, kwargs), not Tiny"),
        ("transformers:BertModle", "Did you mean 'BertModel'?"),
        ("transformers:AutoTokenizer", "not a model class"),
        ("transformers:WhisperModel", "no way to guess an input for 'input_features'"),
        ("timm:vit_tiny_patch16_223", "Did you mean 'vit_tiny_patch16_224'?"),
    ],
)
def test_a_model_that_cannot_be_had_is_bad_usage(capsys, tiny, spec, words):
    assert words in _bad(capsys, "explain", spec)


def test_batch_reaches_the_callable(tiny):
    assert load_target(f"{tiny}:build")[1][0].shape == (2, 17, 16)
    assert load_target(f"{tiny}:build", batch=5)[1][0].shape == (5, 17, 16)
    with pytest.raises(OptionError, match=r"--batch needs a callable that takes `batch`; no_batch\(\) does not"):
        load_target(f"{tiny}:no_batch", batch=5)


def test_one_tensor_is_one_argument(tiny):
    model, inputs, keywords = load_target(f"{tiny}:no_batch")
    assert not model.training
    assert [value.shape for value in inputs] == [(2, 17, 16)]
    assert keywords == {}


def test_a_timm_model_gets_the_input_of_its_own_size():
    model, (image,), keywords = load_target("timm:test_vit", batch=3)
    assert isinstance(model, nn.Module)
    assert image.shape == (3, 3, 160, 160)
    assert keywords == {}


@pytest.mark.parametrize("argv", [[], ["explian"], ["explain"], ["bench", "m:f", "--rounds", "0"], ["demo", "--fast"]])
def test_argparse_errors_end_with_2(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: tokred" in capsys.readouterr().err


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("explain", "methods", "demo", "bench"))


def test_interleaved_calls_each_once_a_round_and_turns_the_order():
    calls = []
    ticks = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = interleaved(functions, rounds=3, tick=lambda: ticks.append(None))
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # the first pair warms up
    assert len(ticks) == 3
    assert seconds.keys() == {"a", "b"}
    assert all(value >= 0 for value in seconds.values())


def test_interleaved_needs_a_round():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        interleaved({"a": lambda: None}, rounds=0)


def test_bench_prints_ratios_to_eager_and_inductor(capsys, tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)  # the table is meant here, not compilation
    monkeypatch.setattr(tokred, "compile", lambda model, **options: model)
    assert main(["bench", f"{tiny}:build", "--recipe", "norm(keep=0.5)", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    for word in ("eager", "inductor", "norm(keep=0.5)", "x inductor", "1.00"):
        assert word in out
