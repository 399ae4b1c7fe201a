"""The registry: methods and passes by name, built-in ones and those of installed plug-ins through the same door."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from tokred.errors import RegistrationError, UnknownMethod, nearest
from tokred.registry.method import Method

__all__ = ["PassSpec", "method_named", "methods", "passes", "register", "register_pass"]

KINDS = ("baseline", "prune", "merge", "sparsify")
STAGES = ("exact", "reduce", "cleanup")
GROUP = "tokred.methods"

Class = TypeVar("Class", bound=type[Method])

_METHODS: dict[str, type[Method]] = {}
_PASSES: dict[str, PassSpec] = {}
_loaded = False


@dataclass(frozen=True)
class PassSpec:
    """A registered pass: `run(graph_module, log)` returns a graph module with the same inputs and outputs."""

    name: str
    run: Callable[[Any, list[str]], Any]
    stage: str
    exact: bool
    before: tuple[str, ...]
    after: tuple[str, ...]


def register(kind: str, name: str) -> Callable[[Class], Class]:
    """Class decorator: make a frozen dataclass derived from `Method` available in recipes under `name`.

    Raises RegistrationError for an unknown kind, a class that is no such dataclass, or a name that is taken.
    """
    if kind not in KINDS:
        raise RegistrationError(f"kind {kind!r} of method {name!r} is unknown.{nearest(kind, KINDS)}")

    def add(cls: Class) -> Class:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise RegistrationError(f"method {name!r}: {cls!r} does not derive from tokred.Method")
        if not (is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            raise RegistrationError(f"method {name!r}: {cls.__name__} must be decorated with @dataclass(frozen=True)")
        taken = _METHODS.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise RegistrationError(f"method {name!r} is already registered by {taken.__module__}.{taken.__qualname__}")
        cls.kind, cls.name = kind, name
        _METHODS[name] = cls
        return cls

    return add


def register_pass(
    name: str,
    *,
    stage: str = "exact",
    exact: bool = False,
    before: str | tuple[str, ...] = (),
    after: str | tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: run a callable `(graph_module, log) -> graph_module` on every captured graph.

    stage   "exact" (before tokens are reduced), "reduce" (right after), "cleanup" (last)
    exact   whether it promises the same numbers; a pass that does not is run only if the option `passes` names it
    before, after   names of passes of the same stage that it must precede or follow
    """
    if stage not in STAGES:
        raise RegistrationError(f"stage {stage!r} of pass {name!r} is unknown.{nearest(stage, STAGES)}")

    def add(run: Callable[..., Any]) -> Callable[..., Any]:
        if not callable(run):
            raise RegistrationError(f"pass {name!r}: {run!r} is not callable")
        first = (before,) if isinstance(before, str) else tuple(before)
        last = (after,) if isinstance(after, str) else tuple(after)
        _PASSES[name] = PassSpec(name, run, stage, exact, first, last)
        return run

    return add


def methods() -> dict[str, type[Method]]:
    """Every registered method by name, the built-in ones and those of installed plug-ins."""
    _load()
    return dict(sorted(_METHODS.items()))


def passes() -> dict[str, PassSpec]:
    """Every pass that a plug-in registered, by name."""
    _load()
    return dict(_PASSES)


def method_named(name: str) -> type[Method]:
    """Raises UnknownMethod with the nearest known name."""
    known = methods()
    if name not in known:
        raise UnknownMethod(f"no method is called {name!r}.{nearest(name, known)}")
    return known[name]


def _load() -> None:
    """Import the built-in methods, then every plug-in; one that fails is a warning that names its distribution."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for kind in KINDS:
        package = importlib.import_module(f"tokred.registry.{kind}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            where = entry.dist.name if entry.dist is not None else entry.value
            warnings.warn(
                f"tokred: the plug-in {entry.name!r} of {where} was left out: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
