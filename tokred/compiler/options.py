"""The backend's options: one frozen dataclass, checked once, with errors that name the nearest valid name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tokred.compiler.calibration import Calibration
from tokred.errors import OptionError, nearest
from tokred.registry.recipe import Recipe, parse_recipe

__all__ = ["Options", "parse_options"]

LOWERINGS = ("inductor", "aot_eager", "eager")
OUTPUTS = ("full", "reduced")
SPANS = ("visual",)


@dataclass(frozen=True)
class Options:
    """See the README's table; `mode` comes from torch.compile itself."""

    recipe: Recipe = field(default_factory=Recipe)
    exact: bool = True
    gate: bool = False
    strict: bool = False
    verify: bool = False
    lower: str = "inductor"
    outputs: str = "full"
    passes: tuple[str, ...] = ()
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    calibration: Calibration | None = None
    dump: Path | None = None
    inductor: dict[str, Any] = field(default_factory=dict)
    mode: str | None = None
    companion: bool = False  # whether tokred.generation runs the model, and tells its caches what was removed
    texts: bool = False  # whether the report carries both graphs as text (explain and dump ask for it)


def parse_options(options: dict[str, Any] | None, mode: str | None = None, *, companion: bool = False) -> Options:
    """Check and convert what the user passed to torch.compile.

    Raises OptionError for an unknown option or a value of the wrong kind, RecipeError for a recipe that cannot be read,
    CalibrationError for a calibration that is none.
    """
    given = dict(options or {})
    known = [f.name for f in fields(Options) if f.name not in ("mode", "texts", "companion")]
    for name in given:
        if name not in known:
            raise OptionError(f"tokred has no option {name!r}.{nearest(str(name), known)}")
    for name in ("exact", "gate", "strict", "verify"):
        if not isinstance(given.get(name, False), bool):
            raise OptionError(f"option {name}={given[name]!r}: True or False")
    for name, values in (("lower", LOWERINGS), ("outputs", OUTPUTS)):
        if name in given and given[name] not in values:
            raise OptionError(f"option {name}={given[name]!r} is unknown.{nearest(str(given[name]), values)}")
    if not isinstance(given.get("inductor", {}), dict):
        raise OptionError(f"option inductor={given['inductor']!r}: a dict of Inductor config patches")
    if isinstance(given.get("calibration"), (str, Path)):
        given["calibration"] = Calibration.load(given["calibration"])
    if not isinstance(given.get("calibration"), Calibration | None):
        raise OptionError(
            f"option calibration={given['calibration']!r}: what tokred.calibrate returns, or a path to it"
        )
    given["spans"] = _spans(given.get("spans", {}))
    if "passes" in given:
        chosen = (given["passes"],) if isinstance(given["passes"], str) else tuple(given["passes"])
        given["passes"] = chosen
    if given.get("dump") is not None:
        given["dump"] = Path(given["dump"])
    given["texts"] = given.get("dump") is not None
    given["recipe"] = parse_recipe(given.get("recipe"))
    return Options(**given, mode=mode, companion=companion)


def _spans(given: Any) -> dict[str, tuple[int, int]]:
    if not isinstance(given, dict):
        raise OptionError(f"option spans={given!r}: a dict such as {{'visual': (35, 611)}}")
    spans = {}
    for name, bounds in given.items():
        if name not in SPANS:
            raise OptionError(f"option spans has no {name!r}.{nearest(str(name), SPANS)}")
        numbers = isinstance(bounds, (tuple, list)) and all(type(bound) is int for bound in bounds)
        if not numbers or len(bounds) != 2 or not 0 <= bounds[0] < bounds[1]:
            raise OptionError(f"option spans: {name} is {bounds!r}, not (first row, row behind the last)")
        spans[name] = (bounds[0], bounds[1])
    return spans
