"""The decode benchmark: what it compares is what it says, and its sums are right. Nothing is timed for its own sake."""

import json

import pytest
import torch

from benchmarks import decode
from tokred.compiler.report import BlockReport, GraphReport


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch.compiler.reset()


def test_without_its_mlps_a_model_shares_all_other_weights():
    model = decode.build(2, 64, torch.float64)
    rest = decode.without_mlps(model)
    own, other = dict(model.named_parameters()), dict(rest.named_parameters())
    assert {name for name in own if name not in other} == {name for name in own if "mlp" in name}
    assert all(other[name] is own[name] for name in other)
    ids = decode.tokens(1, 5)
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, rest(ids).logits)
        for layer in model.model.layers:
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        torch.testing.assert_close(model(ids).logits, rest(ids).logits)


def test_share_gain_and_prediction_follow_from_the_times():
    seconds = {"inductor": [1.0, 2.0], "without": [0.4, 0.8], "exact": [1.0, 2.0], "recipe": [0.7, 1.4]}
    found = decode.summary(seconds, gain=None)
    assert found["share of the MLPs"] == pytest.approx(0.6)
    assert found["x inductor, recipe"] == pytest.approx(1 / 0.7)
    assert found["the MLPs' own gain"] == pytest.approx(2.0)  # 0.6 of the time became 0.3
    assert decode.summary(seconds, gain=2.0)["predicted"] == pytest.approx(1 / 0.7)
    del seconds["without"]
    assert set(decode.summary(seconds, gain=2.0)) == {f"x inductor, {name}" for name in seconds}


@pytest.mark.parametrize("without, recipe", [(0.9, 0.5), (1.1, 1.2)])
def test_nothing_is_said_of_a_gain_that_the_mlps_time_does_not_explain(without, recipe):
    seconds = {"inductor": [1.0], "without": [without], "recipe": [recipe]}
    assert "the MLPs' own gain" not in decode.summary(seconds, gain=None)


def test_the_report_predicts_by_the_last_graph_that_a_recipe_was_asked_about():
    def graph(method, before, after):
        return GraphReport("", [BlockReport("mlp", 0, "", (1, 1), method=method)], flops=(before, after))

    graphs = [graph("cats", 8, 8), graph("cats", 6, 4), graph(None, 9, 3)]
    assert decode.reported(graphs) == 1.5
    assert decode.reported(graphs[2:]) is None


@pytest.mark.slow
def test_each_workload_is_run_and_written(tmp_path, capsys):
    size = ["--layers", "1", "--width", "64", "--rounds", "1", "--lower", "eager"]
    arguments = [*size, "--variants", "inductor", "exact", "--workloads", "prefill"]
    target = tmp_path / "decode.json"
    decode.main([*arguments, "--json", str(target)])
    written = json.loads(target.read_text())
    assert set(written["prefill"]["seconds"]) == {"inductor", "exact"}
    assert written["difference"] == pytest.approx({"inductor": 0, "exact": 0}, abs=1e-5)
    assert 0.5 < written["weights"] < 0.9
    assert "x inductor, exact" in capsys.readouterr().out


def test_nothing_is_measured_without_what_it_is_measured_against(capsys):
    with pytest.raises(SystemExit):
        decode.main(["--variants", "exact"])
    assert "needs inductor" in capsys.readouterr().err
