"""Registration: what may be registered, under which names, and what an error says."""

import re
import subprocess
import sys
from dataclasses import dataclass, fields

import pytest

import tokred
from tokred import Reduction, register, register_pass
from tokred.errors import RegistrationError, UnknownMethod
from tokred.registry import register as registry

BUILT_IN = {
    "evit": "prune",
    "expedit": "merge",
    "norm": "prune",
    "pitome": "merge",
    "pool": "baseline",
    "random": "baseline",
    "tofu": "merge",
    "tome": "merge",
    "tomesd": "merge",
    "fastv": "prune",
    "pyramiddrop": "prune",
    "adaptinfer": "prune",
    "aim": "prune",
    "hidrop": "prune",
    "sparsevlm": "prune",
    "visionzip": "prune",
    "corematching": "prune",
    "correlation": "prune",
    "elastic_pool": "merge",
    "mixture_of_depths": "prune",
    "temporal_fusion": "merge",
    "todre": "prune",
    "zoo_prune": "prune",
    "catp": "prune",
    "token_sparse_attention": "sparsify",
    "cats": "sparsify",
    "teal": "sparsify",
    "core_neurons": "sparsify",
    "skip_block": "sparsify",
    "lora_prune": "sparsify",
    "adaptive_width": "sparsify",
    "moefy": "sparsify",
    "random_neurons": "baseline",
}


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    registry.methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "_PASSES", dict(registry._PASSES))


@dataclass(frozen=True)
class Mine(Reduction):
    """Removes nothing."""

    def removed(self, place):
        return 0


def test_every_built_in_method_is_there_with_its_kind():
    found = {name: cls.kind for name, cls in tokred.methods().items() if cls.__module__.startswith("tokred.")}
    assert found == BUILT_IN
    assert list(tokred.methods()) == sorted(tokred.methods())


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_method_says_what_it_does_and_cites_its_source(name):
    text = tokred.methods()[name].__doc__
    first = text.strip().splitlines()[0]
    assert first.endswith(".")
    assert "arXiv" in text or BUILT_IN[name] == "baseline" or "No paper" in text
    for option in fields(tokred.methods()[name]):
        explained = option.name == "layers" or re.search(rf"(?m)^    (\w+, )*{option.name}\b.*  ", text)
        assert explained, f"{name} does not explain {option.name}"


def test_register_adds_a_method_under_its_name():
    assert register("prune", "mine")(Mine) is Mine
    assert tokred.methods()["mine"] is Mine
    assert (Mine.kind, Mine.name) == ("prune", "mine")
    assert registry.method_named("mine") is Mine


def test_the_same_class_may_be_registered_again():
    register("prune", "mine")(Mine)
    register("merge", "mine")(Mine)
    assert tokred.methods()["mine"].kind == "merge"


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(RegistrationError, match=r"kind 'prunes' of method 'mine' is unknown\. Did you mean 'prune'\?"):
        register("prunes", "mine")


def test_a_name_that_is_taken_names_its_owner():
    with pytest.raises(RegistrationError, match=r"'tome' is already registered by tokred\.registry\.merge\.tome\.ToMe"):
        register("merge", "tome")(Mine)
    assert tokred.methods()["tome"] is not Mine


def test_what_is_no_method_is_refused():
    class Other:
        pass

    for wrong in (Other, Mine()):
        with pytest.raises(RegistrationError, match=r"does not derive from tokred\.Method"):
            register("prune", "other")(wrong)


def test_what_is_no_frozen_dataclass_is_refused():
    class Plain(Reduction):
        pass

    Plain.__dataclass_params__ = type("Params", (), {"frozen": False})()
    with pytest.raises(RegistrationError, match=r"Plain must be decorated with @dataclass\(frozen=True\)"):
        register("prune", "plain")(Plain)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(UnknownMethod, match=r"no method is called 'pitom'\. Did you mean 'pitome'\? Known: .*evit, "):
        registry.method_named("pitom")


def test_register_pass_adds_a_pass():
    @register_pass("tidy", stage="cleanup", exact=True, before="sweep", after=("a", "b"))
    def tidy(graph, log):
        return graph

    spec = registry.passes()["tidy"]
    assert (spec.run, spec.stage, spec.exact, spec.before, spec.after) == (
        tidy,
        "cleanup",
        True,
        ("sweep",),
        ("a", "b"),
    )


def test_register_pass_refuses_an_unknown_stage_and_what_cannot_be_called():
    with pytest.raises(RegistrationError, match=r"stage 'clean' of pass 'tidy' is unknown\. Did you mean 'cleanup'\?"):
        register_pass("tidy", stage="clean")
    with pytest.raises(RegistrationError, match="pass 'tidy': 3 is not callable"):
        register_pass("tidy")(3)


@pytest.mark.slow
def test_methods_load_without_an_import_of_their_modules():
    """In a process of its own: the registry fills itself on first use."""
    code = "from tokred.registry.register import methods; print(*methods())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(BUILT_IN) <= set(out)
