"""The backend's options: one frozen dataclass, checked once, with errors that name the nearest valid name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from tokred.compiler.calibration import Calibration
from tokred.errors import OptionError, nearest
from tokred.registry.recipe import Recipe, parse_recipe
from tokred.registry.spans import GIVEN

__all__ = ["Options", "parse_options"]

LOWERINGS = ("inductor", "aot_eager", "eager")
OUTPUTS = ("full", "reduced")
POSITIONS = ("persistent", "compact")


@dataclass(frozen=True)
class Options:
    """See the README's table; `mode` comes from torch.compile itself.

    positions  "persistent": a token that is left keeps its position; "compact": in causal models those behind a cut are
               numbered without gaps (tokred/compiler/positions.py), or the cut is refused ("compact-positions")
    spans      which rows are what, by name: see `_spans`
    """

    recipe: Recipe = field(default_factory=Recipe)
    exact: bool = True
    gate: bool = False
    strict: bool = False
    verify: bool = False
    lower: str = "inductor"
    outputs: str = "full"
    positions: str = "persistent"
    passes: tuple[str, ...] = ()
    spans: dict[str, Any] = field(default_factory=dict)
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
    for name, values in (("lower", LOWERINGS), ("outputs", OUTPUTS), ("positions", POSITIONS)):
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


def _spans(given: Any) -> dict[str, Any]:
    """By name: (start, stop) as in a slice, a boolean mask [N] or [B N], a token id, or a callable.

    A callable gets one argument, a dict of the model's tensor inputs in this graph by the names of its forward
    ("input_ids", "attention_mask", ...; positional ones are "args[0]" where forward is wrapped), and returns a boolean
    mask [N] or [B N]. It is traced into the graph: plain tensor code, without decisions that depend on data.
    A visual span that ends at both ends of prompts of many lengths, (9, -5), has no fixed number of rows: methods are
    refused where Dynamo makes one graph for all lengths, and act with `dynamic=False`.
    """
    if not isinstance(given, dict):
        raise OptionError(f"option spans={given!r}: a dict such as {{'visual': (35, 611)}}")
    spans: dict[str, Any] = {}
    for name, value in given.items():
        if name not in GIVEN:
            raise OptionError(f"option spans has no {name!r}.{nearest(str(name), GIVEN)}")
        spans[name] = _bounds(name, value) if isinstance(value, (tuple, list)) else value
        if isinstance(value, torch.Tensor) and (value.dtype != torch.bool or value.dim() not in (1, 2)):
            shown = f"{value.dtype} and shape {list(value.shape)}"
            raise OptionError(f"option spans: {name} is a tensor of {shown}, not a mask of torch.bool, [N] or [B, N]")
        known = isinstance(value, (tuple, list, torch.Tensor)) or callable(value) or type(value) is int
        if not known:
            raise OptionError(f"option spans: {name} is {value!r}, not two rows, a mask, a token id or a callable")
    return spans


def _bounds(name: str, bounds: Any) -> tuple[int | None, int | None]:
    if len(bounds) != 2 or not all(bound is None or type(bound) is int for bound in bounds):
        raise OptionError(f"option spans: {name} is {bounds!r}, not (first row, row behind the last)")
    start, stop = bounds
    same_end = start is not None and stop is not None and (start < 0) == (stop < 0)
    if stop == 0 or (same_end and start >= stop):
        raise OptionError(f"option spans: {name} is {bounds!r}, not (first row, row behind the last): it is empty")
    return start, stop
