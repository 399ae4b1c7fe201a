"""README and CONTRIBUTING say what is true: their code runs, their tables name what exists."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import tokred
from tokred.compiler.options import Options
from tokred.demo.model import DigitViT
from tokred.registry import register as registry
from tokred.registry.recipe import parse_recipe

ROOT = Path(__file__).resolve().parent.parent
README, CONTRIBUTING = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
def test_the_readme_s_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, pixels = DigitViT().eval(), torch.randn(2, 1, 32, 32)
    names = {"model": model, "pixels": pixels}
    blocks = python_blocks(README)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert "tome(r=13" in Path("report.html").read_text(encoding="utf-8")
    assert callable(names["fast"])


def test_the_readme_s_option_table_is_complete():
    table = README.split("## Options")[1].split("\n## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert named == [field.name for field in fields(Options) if field.name not in ("mode", "companion", "texts")]


def test_the_readme_s_recipes_can_be_read():
    section = README.split("## Recipes")[1].split("\n## ")[0]
    recipes = re.findall(r"^    (\w+\(.*\))$", section, re.MULTILINE)
    assert len(recipes) == 3
    for recipe in recipes:
        assert parse_recipe(recipe).methods


def test_the_changelog_names_every_method_that_tokred_brings():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    own = [name for name, method in tokred.methods().items() if method.__module__.startswith("tokred.")]
    assert own
    assert [name for name in own if f"`{name}`" not in changelog] == []


def test_the_page_of_refusals_has_every_code_in_the_source_and_no_other():
    # they reach their refusal by a variable
    found = {"compact-positions", "decode", "static-cache", "shape-mismatch", "rewrite-failed"}
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tokred").rglob("*.py")]
    assert [code for code in found if not any(f'"{code}"' in source for source in sources)] == []
    for call in (node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = getattr(call.func, "id", "")
        if name in ("Refusal", "refuse", "PaddingIsRead", "_Unfit") and isinstance(call.args[0], ast.Constant):
            found.add(call.args[0].value)
    page = (ROOT / "docs/refusals.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \|", page, re.MULTILINE)
    assert sorted(code for row in rows for code in re.findall(r"`([\w-]+)`", row)) == sorted(found)


def test_the_method_in_contributing_works():
    source = next(block for block in python_blocks(CONTRIBUTING) if "class NormTop" in block)
    names = {"__name__": "contributing"}
    saved = dict(registry._METHODS)
    try:
        exec(source, names)
        model, pixels = DigitViT().eval(), torch.randn(2, 1, 32, 32)
        (graph,) = tokred.explain(model, pixels, recipe="norm_top(ratio=0.5, layers=[1])").graphs
        cut = [block.tokens for block in graph.blocks if block.method]
        assert cut == [(65, 33)]
    finally:
        registry._METHODS.clear()
        registry._METHODS.update(saved)


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_links_and_paths_exist(text):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    paths = re.findall(r"`((?:tokred|tests|benchmarks|docs)/[\w/.]+)`", text)
    assert links + paths
    assert [path for path in links + paths if not (ROOT / path).exists()] == []
