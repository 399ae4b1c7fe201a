"""The backend as a user meets it: shapes, dtypes, training, graph breaks, options, errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from tests.one_capture import Ways
from tests.zoo.architectures import ARCHITECTURES
from tokred.errors import ArgumentError, OptionError, RecipeError, StrictError, UnknownMethod, VerifyError

TOME = "tome(r=4)"


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    tokred.reset()


def vit(dtype: torch.dtype = torch.float32) -> nn.Module:
    return ARCHITECTURES["vit"].model(dtype)


def pixels(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return ARCHITECTURES["vit"].example(batch, dtype)["pixel_values"]


def compiled(model: Any, recipe: Any = TOME, *, lower: str = "eager", **options: Any) -> Any:
    return torch.compile(model, backend="tokred", options={"recipe": recipe, "lower": lower, **options})


def logits(model: Any, x: Tensor) -> Tensor:
    out = model(pixel_values=x)
    result: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return result


def test_the_backend_is_found_by_name() -> None:
    assert "tokred" in torch._dynamo.list_backends(None)


def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()


@pytest.mark.slow
def test_inductor_agrees_with_the_eager_lowering_and_verify_with_both() -> None:
    model, x = vit(), pixels(3)
    ways = Ways({"eager": {}, "inductor": {"lower": "inductor"}}, recipe=TOME, verify=True)
    fast = ways.compile(model)
    with torch.no_grad():
        expected = logits(fast, x)
        ways.way = "inductor"
        got = logits(fast, x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(model, x), atol=1e-4)  # tokens really were merged


def test_a_new_batch_size_compiles_once_more_and_then_never() -> None:
    model, sixteen, five = vit(), pixels(16), pixels(5)
    fast = compiled(model)
    with torch.no_grad():
        eights = [sixteen[:8], sixteen[8:], torch.cat([five, sixteen[:3]])]
        alone = [logits(fast, x) for x in eights]  # a graph for eight, and no other number
        assert len(tokred.reports().graphs) == 1
        torch.testing.assert_close(logits(fast, sixteen), torch.cat(alone[:2]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits(fast, five), alone[2][:5], rtol=1e-4, atol=1e-5)
    assert len(tokred.reports().graphs) == 2


@pytest.mark.slow
def test_dynamic_batch_from_the_start() -> None:
    options = {"recipe": TOME, "lower": "aot_eager"}
    fast = torch.compile(layer(), backend="tokred", options=options, dynamic=True)
    with torch.no_grad():
        for batch in (2, 7, 3):
            assert fast(torch.randn(batch, 24, 32)).shape == (batch, 24, 32)
    assert len(tokred.reports().graphs) == 1
    assert tokred.reports().graphs[0].blocks[0].method is not None


@pytest.mark.slow
def test_gradients_reach_every_parameter() -> None:
    model = vit().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = pixels(2)
    ways = Ways({lower: {"lower": lower} for lower in ("eager", "aot_eager", "inductor")}, recipe=TOME)
    fast = ways.compile(model)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        logits(fast, x).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    for ways.way in ("aot_eager", "inductor"):
        got = gradients()
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=2e-3, atol=1e-5, msg=f"{ways.way}: {name}")


@pytest.mark.slow
def test_bfloat16_and_autocast_run_and_keep_their_dtype() -> None:
    ways = Ways({"unchanged": {"recipe": None, "lower": "aot_eager"}, "merged": {"recipe": TOME, "lower": "inductor"}})
    with torch.no_grad():
        assert logits(compiled(vit(torch.bfloat16)), pixels(2, torch.bfloat16)).dtype == torch.bfloat16
        model, x = vit(), pixels(2)
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16):
            expected, fast = logits(model, x), ways.compile(model)
            unchanged = logits(fast, x)
            ways.way = "merged"
            merged = logits(fast, x)
    assert merged.dtype == expected.dtype and merged.isfinite().all()
    torch.testing.assert_close(unchanged.float(), expected.float(), rtol=5e-2, atol=5e-2)


def test_two_recipes_live_side_by_side() -> None:
    model, x = vit(), pixels(2)
    few, many = compiled(model, "tome(r=2)"), compiled(model, "tome(r=8)")
    with torch.no_grad():
        first, second = logits(few, x), logits(many, x)
        torch.testing.assert_close(logits(few, x), first)
        torch.testing.assert_close(logits(many, x), second)
    assert not torch.allclose(first, second, atol=1e-5)


class Broken(nn.Module):
    """Ten graphs: a break before each of the last nine steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.steps[0](x)
        torch._dynamo.graph_break()
        x = self.steps[1](x)
        torch._dynamo.graph_break()
        x = self.steps[2](x)
        torch._dynamo.graph_break()
        x = self.steps[3](x)
        torch._dynamo.graph_break()
        x = self.steps[4](x)
        torch._dynamo.graph_break()
        x = self.steps[5](x)
        torch._dynamo.graph_break()
        x = self.steps[6](x)
        torch._dynamo.graph_break()
        x = self.steps[7](x)
        torch._dynamo.graph_break()
        x = self.steps[8](x)
        torch._dynamo.graph_break()
        out: Tensor = self.steps[9](x)
        return out


def test_each_piece_of_a_broken_model_is_handled_on_its_own() -> None:
    model, x = Broken().eval(), torch.randn(2, 24, 32)
    ways = Ways({"exact": {"recipe": None}, "tome": {"recipe": TOME}})
    fast = torch.compile(model, backend=ways)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
        ways.way = "tome"
        assert fast(x).shape == expected.shape
    assert len(ways.reports["exact"]) == len(ways.reports["tome"]) == 10
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="tokred", fullgraph=True)(x)


def test_fullgraph() -> None:
    options = {"recipe": TOME, "lower": "eager"}
    with torch.no_grad():
        fast = torch.compile(layer(), backend="tokred", fullgraph=True, options=options)
        assert fast(torch.randn(2, 24, 32)).shape == (2, 24, 32)


def test_reduced_outputs_are_shorter_and_full_ones_are_not() -> None:
    """In one graph, too."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2).eval()
    x = torch.randn(2, 24, 32)
    ways = Ways({outputs: {"outputs": outputs} for outputs in ("full", "reduced")}, recipe=TOME)
    fast = ways.compile(model)
    with torch.no_grad():
        assert fast(x).shape == (2, 24, 32)
        ways.way = "reduced"
        assert fast(x).shape == (2, 24 - 2 * 4, 32)


# -- options and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"recipee": TOME}, OptionError, "recipe"),
        ({"lower": "inductr"}, OptionError, "inductor"),
        ({"exact": "yes"}, OptionError, "exact"),
        ({"recipe": "tomee(r=3)"}, UnknownMethod, "'tome'"),
        ({"recipe": "tome(rr=3)"}, ArgumentError, "'r'"),
        ({"recipe": "norm(ratio=1.0)"}, ArgumentError, r"\[0, 1\)"),
        ({"recipe": "norm(ratio=-0.1)"}, ArgumentError, r"\[0, 1\)"),
        ({"recipe": "norm(keep=0.5, ratio=0.5)"}, ArgumentError, "give one"),
        ({"recipe": "tome(r=13"}, RecipeError, "tome"),
        ({"recipe": "nowhere.yaml"}, RecipeError, "nowhere.yaml"),
    ],
)
def test_bad_input_names_what_is_wrong(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tokred.compile(nn.Linear(3, 3), **{"recipe": None, **options})
    with pytest.raises(Exception, match=words), torch.no_grad():
        torch.compile(nn.Linear(3, 3), backend="tokred", options=options)(torch.randn(2, 3))


def test_strict_turns_a_refusal_into_an_error() -> None:
    architecture = ARCHITECTURES["ijepa"]
    model, inputs = architecture.model(torch.float32), architecture.example(2, torch.float32)
    with pytest.raises(Exception, match="class token"), torch.no_grad():
        compiled(model, "evit(keep=0.5, layers=[1])", strict=True)(**inputs)
    assert issubclass(StrictError, tokred.TokredError)


def test_protecting_more_tokens_than_remain_is_a_refusal() -> None:
    model = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()

    class ReadsAll(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.prefix = model, nn.Parameter(torch.randn(1, 12, 32))

        def forward(self, x: Tensor) -> Tensor:
            tokens = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1)
            out: Tensor = self.layer(tokens)
            return out

    x = torch.randn(2, 1, 32)
    report = tokred.explain(ReadsAll().eval(), x, recipe="norm(keep=0.01, layers=0)")
    (block,) = [b for b in report.graphs[0].blocks if b.kind == "attention"]
    assert block.tokens[1] == 13 or block.refusal is not None


def test_verify_fails_on_a_wrong_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(gm: torch.fx.GraphModule, log: list[str]) -> torch.fx.GraphModule:
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default):
            node.target = torch.ops.aten.relu.default
            node.kwargs = {}
        log.append("gelu -> relu")
        gm.recompile()
        return gm

    from tokred.registry import register

    spec = register.PassSpec("wrong", wrong, "exact", True, (), ())
    monkeypatch.setitem(register._PASSES, "wrong", spec)
    with torch.no_grad(), pytest.raises(VerifyError, match="'wrong'"):
        logits(compiled(vit(), None, verify=True), pixels(2))


def test_a_pass_that_raises_is_left_out_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokred.registry import register

    def raises(gm: torch.fx.GraphModule, log: list[str]) -> torch.fx.GraphModule:
        raise RuntimeError("not today")

    monkeypatch.setitem(register._PASSES, "raises", register.PassSpec("raises", raises, "exact", True, (), ()))
    model, x = vit(), pixels(2)
    with torch.no_grad():
        torch.testing.assert_close(logits(compiled(model, None), x), logits(model, x), rtol=1e-4, atol=1e-5)
    (entry,) = [p for p in tokred.reports().graphs[0].passes if p.name == "raises"]
    assert entry.refusals[0].code == "pass-raised" and "not today" in entry.refusals[0].reason


def test_an_op_without_a_rule_is_restored_before_and_reported() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
            self.second = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = x + torch.cummax(x, 1).values
            out: Tensor = self.second(x)
            return out

    model, x = Odd().eval(), torch.randn(2, 24, 32)
    with torch.no_grad():
        assert compiled(model)(x).shape == x.shape
    assert any("no rule" in line for line in tokred.reports().graphs[0].restores)


def test_a_graph_without_attention_is_left_alone() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(2, 8)
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))


def test_dump_writes_every_stage(tmp_path: Path) -> None:
    with torch.no_grad():
        compiled(layer(), dump=str(tmp_path))(torch.randn(2, 24, 32))
    names = {path.name for path in tmp_path.iterdir()}
    for suffix in (".py", ".dot", ".svg", ".html"):
        assert any("captured" in name and name.endswith(suffix) for name in names)
        assert any("reduce_tokens" in name and name.endswith(suffix) for name in names)
    assert {"report.json", "report.html"} <= names


@pytest.mark.slow
def test_torch_logs_shows_the_graphs() -> None:
    code = (
        "import torch, tokred;"
        "m = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval();"
        "f = torch.compile(m, backend='tokred', options={'recipe': 'tome(r=4)', 'lower': 'eager'});"
        "torch.set_grad_enabled(False); f(torch.randn(2, 24, 32))"
    )
    import os

    environment = {**os.environ, "TORCH_LOGS": "+tokred"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "after reduce_tokens" in done.stderr and "tome(r=4" in done.stderr


def test_explain_works_on_a_model_that_was_compiled_many_times() -> None:
    """Dynamo runs a ninth variant of one forward as it stands; a report on nothing would be the result."""
    model, x = layer(), torch.randn(2, 24, 32)
    with torch.no_grad():
        for _ in range(torch._dynamo.config.recompile_limit):
            torch.compile(model, backend=lambda gm, inputs: gm.forward)(x)
    (graph,) = tokred.explain(model, x, recipe=TOME).graphs
    assert any(block.method for block in graph.blocks)


def test_the_report_lists_blocks_in_the_order_in_which_they_run() -> None:
    (graph,) = tokred.explain(vit(), pixel_values=pixels(2)).graphs
    assert [(block.kind, block.layer) for block in graph.blocks] == [
        (kind, layer) for layer in range(3) for kind in ("attention", "mlp")
    ]


def test_a_graph_that_cannot_be_captured_inside_a_vmap_is_compiled_unchanged() -> None:
    """Dynamo's graph opens and closes the vmap by calls; a trace that fails between them must close it as well."""

    def function(x: Tensor) -> Tensor:
        return torch.vmap(lambda row: (row * torch.tensor(2.0)).sum())(x) + x.relu().sum()

    x = torch.randn(3, 4)
    fast = torch.compile(function, backend="tokred", options={"lower": "eager"})
    assert torch.equal(fast(x), function(x))
    assert "compiled unchanged" in tokred.reports().graphs[0].notes[0]
