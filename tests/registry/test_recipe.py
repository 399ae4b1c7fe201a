"""Recipes: strings, mappings, files and objects; every mistake is a sentence with the nearest valid name."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tokred.errors import ArgumentError, RecipeError, TokredError, UnknownMethod
from tokred.registry.merge.tome import ToMe
from tokred.registry.method import Reduction
from tokred.registry.prune.evit import EViT
from tokred.registry.prune.norm import NormTopK
from tokred.registry.recipe import Recipe, parse_recipe


@pytest.mark.parametrize(
    "given, expected",
    [
        ("tome(r=13)", ToMe(r=13)),
        ("tome(13)", ToMe(r=13)),
        ("tome", ToMe()),
        ("  tome( r = 13 )\n", ToMe(r=13)),
        ("tome(r=[4, 3, 2], prop_attn=False)", ToMe(r=[4, 3, 2], prop_attn=False)),
        ("tome(r=(8, -0.5))", ToMe(r=(8, -0.5))),
        ("evit(0.6, fuse=False, layers=[1, -1])", EViT(keep=0.6, fuse=False, layers=[1, -1])),
        ("norm(keep=.5, layers='8:24')", NormTopK(keep=0.5, layers="8:24")),
        ("norm(ratio=1/4)", None),
        ({"tome": {"r": 13}}, ToMe(r=13)),
        ({"tome": None}, ToMe()),
        (ToMe(r=2), ToMe(r=2)),
        (["tome(r=2)"], ToMe(r=2)),
    ],
)
def test_one_method(given, expected):
    if expected is None:
        with pytest.raises(RecipeError, match="must be Python literals"):
            parse_recipe(given)
    else:
        assert parse_recipe(given) == Recipe((expected,))


@pytest.mark.parametrize(
    "given",
    [
        "tome(r=13) + norm(keep=0.7)",
        "tome(13)+norm(0.7)",
        ["tome(r=13)", NormTopK(keep=0.7)],
        [Recipe((ToMe(r=13),)), {"norm": {"keep": 0.7}}],
        {"tome": {"r": 13}, "norm": {"keep": 0.7}},
    ],
)
def test_two_methods_in_order(given):
    assert parse_recipe(given).methods == (ToMe(r=13), NormTopK(keep=0.7))


@pytest.mark.parametrize("given", [None, "", [], {}, Recipe()])
def test_nothing_is_the_empty_recipe(given):
    assert parse_recipe(given) == Recipe()


@pytest.mark.parametrize(
    "recipe", ["tome(r=13) + norm(keep=0.7, layers='2:5')", "evit(fuse=False)", "tome(r=(4, 1.0))"]
)
def test_a_recipe_prints_as_one_that_reads_the_same(recipe):
    parsed = parse_recipe(recipe)
    assert parse_recipe(str(parsed)) == parsed


YAML = """
recipe:
  tome: {r: [4, 3], prop_attn: false}
  norm: {keep: 0.7}
"""


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_files(tmp_path, suffix, wrap):
    content = {"tome": {"r": [4, 3], "prop_attn": False}, "norm": {"keep": 0.7}}
    path = tmp_path / f"recipe{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps({"recipe": content} if wrap else content))
    else:
        path.write_text(YAML if wrap else "- tome(r=[4, 3], prop_attn=False)\n- norm: {keep: 0.7}\n")
    expected = Recipe((ToMe(r=[4, 3], prop_attn=False), NormTopK(keep=0.7)))
    assert parse_recipe(path) == expected
    assert parse_recipe(str(path)) == expected


ERRORS = [
    ("tomee(r=3)", UnknownMethod, "no method is called 'tomee'. Did you mean 'tome'? Known: "),
    ("tome(s=3)", ArgumentError, "tome has no argument 's'. Known: layers, order, prop_attn, r."),
    ("evit(kep=0.3)", ArgumentError, "evit has no argument 'kep'. Did you mean 'keep'?"),
    ("tome(3, True, 'tome', 4)", ArgumentError, "tome takes at most 3 positional arguments: r, prop_attn, order"),
    ("tome(3, r=4)", ArgumentError, "tome: 'r' is given twice"),
    ("tome(r=x)", RecipeError, "the arguments of tome must be Python literals"),
    ("tome(**{'r': 3})", RecipeError, "** is not understood"),
    ("tome(r=3", RecipeError, "recipe 'tome(r=3': "),
    ("tome(r=3) - norm()", RecipeError, "is not a method call such as tome(r=13)"),
    ("a.tome(r=3)", RecipeError, "is not a method call such as tome(r=13)"),
    ("3", RecipeError, "is not a method call such as tome(r=13)"),
    ("norm(keep=0.5) + tomy()", UnknownMethod, "no method is called 'tomy'. Did you mean 'tome'?"),
    (13, RecipeError, "a recipe is a string, a path, a method or a list of methods, not int"),
    ([13], RecipeError, "not int"),
    ({"tome": 13}, RecipeError, "the options of 'tome' must be a mapping, not 13"),
    ({"tome": {"R": 13}}, ArgumentError, "tome has no argument 'R'"),
    ("norm(layers=2.5)", ArgumentError, "norm(layers=2.5): ints, a slice such as '8:24', or a glob on module names"),
    ("norm(layers=[True])", ArgumentError, "norm(layers=[True]): ints, a slice"),
    ("norm(layers='a:b')", ArgumentError, "layers='a:b' is neither a slice such as '8:24' nor a glob"),
    (NormTopK(layers={1}), ArgumentError, "norm(layers={1}): ints, a slice"),
    ("missing.yaml", RecipeError, "recipe file 'missing.yaml': No such file or directory"),
]


@pytest.mark.parametrize("given, kind, message", ERRORS, ids=lambda value: str(value)[:30])
def test_mistakes(given, kind, message):
    with pytest.raises(kind) as caught:
        parse_recipe(given)
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert isinstance(caught.value, TokredError)


@pytest.mark.parametrize("name, text", [("a.yaml", "tome: [1"), ("a.json", '{"tome": ')])
def test_a_file_that_cannot_be_read_names_itself(tmp_path, name, text):
    path: Path = tmp_path / name
    path.write_text(text)
    with pytest.raises(RecipeError, match=f"recipe file '{path}'"):
        parse_recipe(path)


# -- layers -----------------------------------------------------------------------------------------------------------

LAYERS = [
    (None, [0, 1, 2, 3, 4, 5]),
    (2, [2]),
    (-1, [5]),
    ([0, -2], [0, 4]),
    ((1, 1, 9), [1]),
    ([], []),
    ("2:4", [2, 3]),
    ("-2:", [4, 5]),
    ("::2", [0, 2, 4]),
    ("*.3.*", [3]),
    ("*attn", [0, 1, 2, 3, 4, 5]),
    ("decoder*", []),
]


@pytest.mark.parametrize("layers, expected", LAYERS, ids=str)
def test_layers_choose_blocks(layers, expected):
    method = ToMe(layers=layers)
    assert [layer for layer in range(6) if method.acts_on(layer, 6, f"encoder.{layer}.attn")] == expected


QUARTERS = [(12, [3, 6, 9]), (4, [1, 2, 3]), (3, [1]), (2, [1]), (1, [0]), (24, [6, 12, 18])]


@pytest.mark.parametrize("depth, expected", QUARTERS)
def test_share_methods_cut_at_the_quarters(depth, expected):
    assert [layer for layer in range(depth) if EViT().acts_on(layer, depth, "")] == expected
    assert EViT(layers=[0]).acts_on(0, depth, "")


def test_a_method_without_a_plan_says_so():
    @dataclass(frozen=True)
    class Nothing(Reduction):
        pass

    with pytest.raises(NotImplementedError):
        Nothing().removed(None)
    with pytest.raises(NotImplementedError):
        Nothing().plan(None)
