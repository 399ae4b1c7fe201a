"""Recipes: which methods, where, how much. `"tome(r=13) + norm(keep=0.7)"`, a YAML or JSON file, or method objects."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tokred.errors import ArgumentError, RecipeError, nearest
from tokred.registry.method import Method, check_layers
from tokred.registry.register import method_named

__all__ = ["Recipe", "parse_recipe"]

Kind = TypeVar("Kind", bound=Method)


@dataclass(frozen=True)
class Recipe:
    """Methods in the order in which they are tried at each site."""

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        for method in self.methods:
            check_layers(method.name, method.layers)

    def of(self, kind: type[Kind]) -> tuple[Kind, ...]:
        """The methods of one base class: `recipe.of(Reduction)`."""
        return tuple(method for method in self.methods if isinstance(method, kind))

    def __str__(self) -> str:
        return " + ".join(str(method) for method in self.methods)


def parse_recipe(recipe: Any) -> Recipe:
    """A recipe from a string, a path to YAML or JSON, a Recipe, a method object, or a list of those.

    Raises UnknownMethod, ArgumentError, or RecipeError where the text cannot be read.
    """
    if recipe is None or recipe == "":
        return Recipe()
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Method):
        return Recipe((recipe,))
    if isinstance(recipe, (list, tuple)):
        return Recipe(tuple(method for part in recipe for method in parse_recipe(part).methods))
    if isinstance(recipe, dict):
        return Recipe(tuple(build_method(name, options) for name, options in recipe.items()))
    if isinstance(recipe, (str, Path)):
        text = str(recipe)
        if text.endswith((".yaml", ".yml", ".json")):
            return _from_file(Path(text))
        return _from_text(text)
    raise RecipeError(f"a recipe is a string, a path, a method or a list of methods, not {type(recipe).__name__}")


def build_method(name: str, options: Any) -> Method:
    """A method object from its name and a mapping of its options."""
    cls = method_named(str(name))
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise RecipeError(f"the options of {name!r} must be a mapping, not {options!r}")
    known = [field.name for field in fields(cls)]
    for option in options:
        if option not in known:
            raise ArgumentError(f"{name} has no argument {option!r}.{nearest(str(option), known)}")
    try:
        return cls(**options)
    except TypeError as error:
        raise ArgumentError(f"{name}: {error}") from None


def _from_text(text: str) -> Recipe:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise RecipeError(f"recipe {text!r}: {error.msg} at column {error.offset}") from None
    return Recipe(tuple(_from_node(node, text) for node in _terms(tree)))


def _terms(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_terms(node.left), *_terms(node.right)]
    return [node]


def _from_node(node: ast.expr, text: str) -> Method:
    if isinstance(node, ast.Name):
        return build_method(node.id, {})
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise RecipeError(f"recipe {text!r}: {ast.unparse(node)!r} is not a method call such as tome(r=13)")
    name = node.func.id
    order = [field.name for field in fields(method_named(name)) if field.name != "layers"]
    options: dict[str, Any] = {}
    try:
        if len(node.args) > len(order):
            raise ArgumentError(f"{name} takes at most {len(order)} positional arguments: {', '.join(order)}")
        for option, value in zip(order, node.args, strict=False):
            options[option] = ast.literal_eval(value)
        for keyword in node.keywords:
            if keyword.arg is None:
                raise RecipeError(f"recipe {text!r}: ** is not understood")
            if keyword.arg in options:
                raise ArgumentError(f"{name}: {keyword.arg!r} is given twice")
            options[keyword.arg] = ast.literal_eval(keyword.value)
    except RecipeError:
        raise
    except ValueError:
        raise RecipeError(f"recipe {text!r}: the arguments of {name} must be Python literals") from None
    return build_method(name, options)


def _from_file(path: Path) -> Recipe:
    try:
        text = path.read_text()
    except OSError as error:
        raise RecipeError(f"recipe file {str(path)!r}: {error.strerror}") from None
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe file {str(path)!r}: {error}") from None
    if isinstance(data, dict) and set(data) == {"recipe"}:
        data = data["recipe"]
    return parse_recipe(data)
