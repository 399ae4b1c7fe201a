"""Whole models: what tokred compiles equals the hand-written oracles of tests/reference, in float64 to 1e-9."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.one_capture import Switch
from tests.reference.cases import CASES, DEIT_SMALL, Case, outputs
from tests.reference.driver import Method
from tests.reference.evit import EViT
from tests.reference.expedit import Expedit
from tests.reference.pitome import PiToMe
from tests.reference.tofu import ToFu
from tests.reference.tome import ToMe
from tokred.compiler.options import parse_options

TOME = "tome(r=5)"
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}

# recipe -> oracle: one of each method for every model
MAIN: dict[str, Method] = {
    TOME: ToMe(5),
    "tofu(r=5)": ToFu(5),
    "pitome(keep=0.85)": PiToMe(0.85),
    "evit(keep=0.7, layers=[1, 2])": EViT(0.7, [1, 2]),
    "expedit(layer=1, grid=(4, 4))": Expedit(1, (4, 4)),
}
# the options, on a model that returns every token and reads the first one
OPTIONS: dict[str, Method] = {
    "tome(r=5, prop_attn=False)": ToMe(5, prop_attn=False),
    "tome(r=[6, 0, 3])": ToMe([6, 0, 3]),
    "tome(r=(6, -0.5))": ToMe((6, -0.5)),
    "tome(r=40)": ToMe(40),  # more than half: capped
    "tome(r=5, layers=[1, 3])": ToMe([0, 5, 0, 5]),
    "tofu(r=[0, 6, 6, 2])": ToFu([0, 6, 6, 2]),
    "pitome(keep=[0.9, 1.0, 0.6])": PiToMe([0.9, 1.0, 0.6]),
    "pitome(ratio=0.2)": PiToMe(0.8),
    "pitome(keep=0.85, prop_attn=True)": PiToMe(0.85, prop_attn=True),
    "evit(keep=0.45, layers=[0, 1, 2, 3])": EViT(0.45, [0, 1, 2, 3]),
    "expedit(layer=0, grid=(5, 3), iterations=2, tau=0.05, window=3, top_k=4)": Expedit(0, (5, 3), 2, 0.05, 3, 4),
}
LACKS = {"siglip_vision": "evit(keep=0.5, layers=[1])", "bert_model": "expedit(layer=1, grid=(2, 2))"}


def applies(case: Case, recipe: str) -> bool:
    """EViT needs a class token, Expedit a grid."""
    return not (recipe.startswith("evit") and not case.head) and not (recipe.startswith("expedit") and not case.grid)


Way = tuple[str, bool]  # a recipe, and whether the exact passes run
WITH_EXACT = ("vit_classifier", "siglip_vision", "timm_vit_avg")  # whose gradients are compared with them, too


def ways_of(case: Case) -> dict[Way, Method | None]:
    """The oracle of each; None is the model itself."""
    without = {recipe: method for recipe, method in MAIN.items() if applies(case, recipe)}
    if case.name == "vit_model":
        without |= OPTIONS
    if case.name == "dinov2_registers_classifier":  # under mean pooling
        without |= {recipe: method for recipe, method in OPTIONS.items() if "prop_attn" in recipe or "tofu" in recipe}
    ways: dict[Way, Method | None] = {(recipe, False): method for recipe, method in without.items()}
    ways[TOME, True] = MAIN[TOME]
    if case.name == "vit_classifier":
        ways["evit(keep=0.5, layers=[1, 2], fuse=False)", True] = EViT(0.5, [1, 2], fuse=False)
    if case.name in LACKS:
        ways[LACKS[case.name], False] = None
    return ways


def named(value: object) -> str:
    return value.name if isinstance(value, Case) else str(value)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=named)
def test_methods_equal_oracles(case: Case, subtests: pytest.Subtests) -> None:
    """ToMe's gradients as well. siglip_vision has no class token and bert_model no grid: the method that needs it
    changes nothing there."""
    ways = ways_of(case)
    options = {way: {"recipe": way[0], "exact": way[1], "lower": "eager"} for way in ways}
    switch: Any = Switch({way: parse_options(given, None) for way, given in options.items()})  # type: ignore[misc]
    model, x = case.build(), case.inputs()
    x.requires_grad_(not case.text)
    fast = torch.compile(model, backend=switch)
    for switch.way, oracle in ways.items():
        recipe, exact = switch.way
        derived = recipe == TOME and (not exact or case.name in WITH_EXACT)
        with subtests.test(f"{recipe}, exact={exact}"):
            expected = case.oracle(model, x, oracle)
            got = outputs(fast, x, list(expected))
            for key, value in expected.items():
                torch.testing.assert_close(got[key], value, **TOLERANCE, msg=lambda text, key=key: f"{key}: {text}")
            if derived:
                compare_gradients(gradients(got, model, x), gradients(expected, model, x))


def compiled(model: nn.Module, recipe: str, **options: Any) -> nn.Module:
    return torch.compile(model, backend="tokred", options={"recipe": recipe, "lower": "eager", **options})


@pytest.mark.slow
def test_real_deit_small_equals_oracle() -> None:
    """Twelve blocks, 197 tokens, r=13: 41 tokens are left."""
    model, x = DEIT_SMALL.build(), DEIT_SMALL.inputs(2)
    with torch.no_grad():
        expected = DEIT_SMALL.oracle(model, x, ToMe(13))
        got = outputs(compiled(model, "tome(r=13)"), x, list(expected))
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, **TOLERANCE)


def gradients(out: dict[str, Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of one fixed scalar that weighs every output element differently."""
    loss = sum((value * torch.linspace(-1, 2, value.numel()).view_as(value).double()).sum() for value in out.values())
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if x.requires_grad:
        wanted["input"] = x
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}


def compare_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected.keys() ^ got.keys():  # without influence: no gradient on one side, zeros on the other
        assert not (expected | got)[name].any(), name
    for name in expected.keys() & got.keys():
        torch.testing.assert_close(
            got[name], expected[name], **TOLERANCE, msg=lambda text, name=name: f"gradient of {name}: {text}"
        )
