"""Every error that tokred raises.

    TokredError
      OptionError        an unknown backend option, or a value it does not take
      RecipeError        a recipe string, file or object that cannot be read
        UnknownMethod    no method of that name is registered
        ArgumentError    a method argument that does not exist, or a value outside its range
      CalibrationError   a calibration that is damaged, of another model, or did not measure what a method needs
      RegistrationError  `@register` or `@register_pass` called with something that cannot be registered
      StrictError        `strict=True`, and a named method was refused somewhere
      VerifyError        `verify=True`, and a stage changed the numbers beyond its promise

A refusal ("not here, because ...") is not an error: it is a `Refusal` in the report.
"""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "ArgumentError",
    "CalibrationError",
    "OptionError",
    "RecipeError",
    "RegistrationError",
    "StrictError",
    "TokredError",
    "UnknownMethod",
    "VerifyError",
    "in_a_line",
    "nearest",
]


class TokredError(Exception):
    """The root: catching it catches everything that tokred raises on purpose."""


class OptionError(TokredError, ValueError):
    """An unknown backend option, or a value that the option does not take."""


class RecipeError(TokredError, ValueError):
    """A recipe that cannot be read."""


class UnknownMethod(RecipeError):
    """No registered method has this name."""


class ArgumentError(RecipeError):
    """A method has no such argument, or the argument's value is out of range."""


class CalibrationError(TokredError, ValueError):
    """A calibration is damaged, is of another model, or did not measure what a method needs; or there is none."""


class RegistrationError(TokredError, ValueError):
    """Something that is neither a method nor a pass was registered, or a name was taken."""


class StrictError(TokredError):
    """A named method was refused while `strict=True`."""


class VerifyError(TokredError):
    """A compiled graph differs from eager by more than its passes promise."""


def in_a_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says: what a report or the log has room for."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that ends an error message: the nearest known name, and then all of them."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(names)}."
