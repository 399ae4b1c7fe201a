"""Plug-ins: the real package in tests/plugin, which `make` installs, and packages that are broken in several ways."""

import importlib
import sys
import warnings
from importlib.metadata import entry_points

import pytest
import torch
from torch import nn

import tokred
from tokred.errors import ArgumentError
from tokred.registry import register as registry

pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture(scope="module")
def installed():
    if not any(entry.name == "example" for entry in entry_points(group=registry.GROUP)):
        pytest.fail("tests/plugin is not installed: pip install --no-deps -e tests/plugin (make test does it)")


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.dropout(self.proj(attended))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """A class token and 16 patches through three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.ModuleList(Block(16, 2) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return SmallViT().double().eval()


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def compiled(model, recipe, **options):
    torch._dynamo.reset()
    tokred.reset()
    return torch.compile(model, backend="tokred", options={"recipe": recipe, "lower": "eager", **options})


def test_method_and_pass_are_listed():
    assert tokred.methods()["every_other"].__module__ == "tokred_example_plugin.every_other"
    assert registry.passes()["drop_idle_dropout"].exact


def test_the_method_removes_what_it_says_where_it_says(vit, pixels):
    report = tokred.explain(vit, pixels, recipe="every_other()")
    attention = [block for block in report.graphs[0].blocks if block.kind == "attention"]
    assert len(attention) == 3
    assert [(block.layer, block.tokens) for block in attention if block.method] == [(1, (17, 9))]


def test_the_compiled_model_is_the_one_that_drops_every_other_patch(vit, pixels):
    def by_hand(pixels):
        x = vit.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls.expand(len(x), -1, -1), x], 1)
        for number, block in enumerate(vit.blocks):
            if number != 1:
                x = block(x)
                continue
            mlp, block.mlp = block.mlp, nn.Identity()  # the cut is after the attention, before the MLP
            norm, block.norm2 = block.norm2, Zero()
            x = block(x)
            block.mlp, block.norm2 = mlp, norm
            x = torch.cat([x[:, :1], x[:, 1::2]], 1)
            x = x + mlp(norm(x))
        return vit.head(x[:, 0])

    torch.testing.assert_close(compiled(vit, "every_other()")(pixels), by_hand(pixels), rtol=1e-12, atol=1e-12)
    (graph,) = tokred.reports().graphs
    assert [block.tokens for block in graph.blocks if block.method] == [(17, 9)]


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_nothing_removed_is_the_model_itself(vit, pixels):
    assert torch.equal(compiled(vit, "every_other(ratio=0)", exact=False)(pixels), vit(pixels))


def test_the_pass_removes_idle_dropout_and_nothing_else(vit, pixels):
    result = compiled(vit, "")(pixels)
    (graph,) = tokred.reports().graphs
    (entry,) = [each for each in graph.passes if each.name == "drop_idle_dropout"]
    assert entry.changes == 3
    torch.testing.assert_close(result, vit(pixels), rtol=1e-12, atol=1e-12)
    (told,) = tokred.explain(vit, pixels).graphs
    assert "aten.dropout" in told.before
    assert "aten.dropout" not in told.after


def test_the_pass_leaves_dropout_that_works(pixels):
    result = compiled(SmallViT().double().train(), "")(pixels)
    assert result.isfinite().all()
    (graph,) = tokred.reports().graphs
    (entry,) = [each for each in graph.passes if each.name == "drop_idle_dropout"]
    assert entry.changes == 0


def test_exact_false_leaves_the_pass_out(vit, pixels):
    compiled(vit, "", exact=False)(pixels)
    assert [each.name for each in tokred.reports().graphs[0].passes] == []


def test_a_bad_argument_is_the_plug_in_s_own_error():
    with pytest.raises(ArgumentError, match=r"every_other\(ratio=1\.5\): the fraction removed must lie in \[0, 1\)"):
        tokred.Recipe((tokred.methods()["every_other"](ratio=1.5),))


@pytest.mark.slow
def test_the_plug_in_passes_the_contract_test():
    from tokred.testing import check_method

    check_method(tokred.methods()["every_other"])


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Install a plug-in whose module has the given source, for this test alone, and load all plug-ins again."""
    saved = dict(registry._METHODS), dict(registry._PASSES)

    def install(source: str, target: str = "broken_plugin") -> None:
        (tmp_path / "broken_plugin.py").write_text(source)
        info = tmp_path / "a_broken_distribution-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-broken-distribution\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\nbroken = {target}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        monkeypatch.setattr(registry, "_loaded", False)

    yield install
    sys.modules.pop("broken_plugin", None)
    for registered, before in zip((registry._METHODS, registry._PASSES), saved, strict=True):
        registered.clear()
        registered.update(before)


@pytest.mark.parametrize(
    "source, target, error",
    [
        ("raise ZeroDivisionError('at import')", "broken_plugin", "ZeroDivisionError: at import"),
        ("import a_module_that_nobody_has", "broken_plugin", "ModuleNotFoundError"),
        ("def (", "broken_plugin", "SyntaxError"),
        ("", "broken_plugin:missing", "AttributeError"),
        (
            "from tokred import register\n@register('prune', 'no_reduction')\nclass NoReduction: pass",
            "broken_plugin",
            "RegistrationError: method 'no_reduction'",
        ),
    ],
)
def test_a_broken_plug_in_is_a_warning_that_names_its_distribution(plug_in, source, target, error):
    plug_in(source, target)
    with pytest.warns(RuntimeWarning, match=f"'broken' of a-broken-distribution.*{error}") as caught:
        names = set(tokred.methods())
    assert len(caught) == 1
    assert {"tome", "every_other"} <= names
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, not at every use
        assert names == set(tokred.methods())


def test_the_host_goes_on_without_a_broken_plug_in(plug_in, vit, pixels):
    plug_in("raise ZeroDivisionError")
    with pytest.warns(RuntimeWarning, match="a-broken-distribution"):
        result = compiled(vit, "every_other(ratio=0)", exact=False)(pixels)
    assert torch.equal(result, vit(pixels))


RAISING_PASS = """
from tokred import register_pass

@register_pass("raising", stage="exact", exact=True, after="drop_idle_dropout")
def raising(graph, log):
    graph.graph.erase_node(next(iter(graph.graph.nodes)))
    return graph
"""


def test_a_pass_that_raises_is_left_out_and_reported(plug_in, vit, pixels):
    plug_in(RAISING_PASS)
    torch.testing.assert_close(compiled(vit, "")(pixels), vit(pixels), rtol=1e-12, atol=1e-12)
    passes = tokred.reports().graphs[0].passes
    names = [each.name for each in passes]
    assert names.index("drop_idle_dropout") < names.index("raising")
    (refusal,) = passes[names.index("raising")].refusals
    assert refusal.code == "pass-raised"


RAISING_METHOD = """
from dataclasses import dataclass
from tokred import Reduction, register

@register("prune", "raising_method")
@dataclass(frozen=True)
class RaisingMethod(Reduction):
    def removed(self, place):
        return 2

    def plan(self, site):
        raise KeyError("while planning")
"""


def test_a_method_that_raises_is_a_refusal_and_the_model_still_runs(plug_in, vit, pixels):
    plug_in(RAISING_METHOD)
    result = compiled(vit, "raising_method()", exact=False)(pixels)
    torch.testing.assert_close(result, vit(pixels), rtol=1e-12, atol=1e-12)
    refusals = [block.refusal for block in tokred.reports().graphs[0].blocks if block.kind == "attention"]
    assert len(refusals) == 3
    assert all(refusal is not None and "KeyError" in refusal.reason for refusal in refusals)
