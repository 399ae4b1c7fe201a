"""The command `tokred`: `explain`, `methods`, `demo`, `bench`. Exit codes: 0, and 2 for bad usage (told on stderr)."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokred.errors import OptionError, TokredError, nearest

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    Target = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

__all__ = ["load_target", "main"]

_MODEL_HELP = (
    "module:callable that returns (model, args) or (model, args, kwargs), or timm:NAME, or transformers:CLASS "
    "(the last two with random weights: nothing is downloaded)"
)
_TEXT_TOKENS = 128  # a text model's input: [B 128], or as long as its positions reach


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except TokredError as error:
        print(f"tokred: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokred", description="A torch.compile backend that makes a transformer compute fewer tokens."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    explain = commands.add_parser("explain", help="what a recipe does to a model: where, how much, and why not")
    _add_target(explain)
    explain.add_argument("--html", type=Path, metavar="PATH", help="also write the HTML report there")
    explain.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    explain.set_defaults(run=_explain)

    methods = commands.add_parser("methods", help="every registered method, its arguments and their defaults")
    methods.set_defaults(run=_methods)

    demo = commands.add_parser("demo", help="accuracy against speed of every method, on handwritten digits")
    which = "one digit an image and a ViT (the default), or mosaics of them, questions in words and a LLaVA"
    demo.add_argument("which", nargs="?", choices=("digits", "mosaic"), default="digits", help=which)
    demo.add_argument("--rounds", type=_positive, default=None, help="timed calls for each recipe")
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="where the results go (./out)")
    demo.add_argument("--quick", action="store_true", help="one recipe for each method")
    demo.add_argument("--speed", action="store_true", help="mosaic: time each recipe as well, a minute or two for each")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="time a recipe against eager and against backend='inductor'")
    _add_target(bench)
    bench.add_argument("--rounds", type=_positive, default=11, help="timed calls of each variant (11)")
    bench.set_defaults(run=_bench)
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--recipe", metavar="R", default=None, help='such as "tome(r=13)"; default: exact passes only')
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the backend: gate=True"
    )
    parser.add_argument("--batch", type=_positive, default=None, help="batch size (default: 8, or the callable's own)")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The `--option`s: Python literals, or words."""
    options: dict[str, Any] = {}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise OptionError(f"--option {text!r} is not of the form NAME=VALUE.")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


# --- the commands -------------------------------------------------------------------------------------------------


def _explain(args: argparse.Namespace) -> None:
    import tokred

    model, inputs, keywords = load_target(args.model, args.batch)
    report = tokred.explain(model, *inputs, recipe=args.recipe, options=_options(args), **keywords)
    print(json.dumps(report.to_json(), indent=2) if args.json else report)
    if args.html is not None:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        print(f"wrote {report.to_html(args.html)}", file=sys.stderr)  # stdout may be JSON


def _methods(args: argparse.Namespace) -> None:
    from rich.table import Table

    import tokred

    table = Table(title="methods")
    for heading in ("name", "kind", "what it does", "arguments"):
        table.add_column(heading, overflow="fold")
    for name, method in sorted(tokred.methods().items(), key=lambda item: (item[1].kind, item[0])):
        table.add_row(name, method.kind, _first_line(method), ", ".join(_arguments(method)))
    _console().print(table)


def _demo(args: argparse.Namespace) -> None:
    options = {"out": args.out, "rounds": args.rounds, "quick": args.quick}
    if args.which == "mosaic":
        from tokred.demo.mosaic import table

        needed = "tokred.demo.mosaic.model:load"
        _attribute(_import("transformers", needed), "LlavaForConditionalGeneration", needed)
        table.run_demo(_console(), **options, speed=args.speed)
        return
    from tokred.demo.run import run_demo

    run_demo(_console(), **options)


def _bench(args: argparse.Namespace) -> None:
    import torch
    from rich.table import Table

    import tokred
    from tokred.bench import interleaved

    model, inputs, keywords = load_target(args.model, args.batch)
    compiled = {
        "eager": model,
        "inductor": torch.compile(model, backend="inductor"),
        f"tokred {args.recipe or '(exact passes only)'}": tokred.compile(model, recipe=args.recipe, **_options(args)),
    }
    with torch.no_grad():
        calls = {name: _call(function, inputs, keywords) for name, function in compiled.items()}
        seconds = interleaved(calls, args.rounds)
    table = Table(title=f"{args.model}: medians of {args.rounds} interleaved calls, {torch.get_num_threads()} threads")
    table.add_column("variant")
    for heading in ("ms", "x eager", "x inductor"):
        table.add_column(heading, justify="right")
    for name, median in seconds.items():
        ratios = (f"{seconds[base] / median:.2f}" for base in ("eager", "inductor"))
        table.add_row(name, f"{median * 1000:.2f}", *ratios)
    _console().print(table)


def _call(function: Callable[..., Any], inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Callable[[], Any]:
    return lambda: function(*inputs, **keywords)


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=140, highlight=False)  # a pipe has no width: 80 would fold


def _first_line(method: type) -> str:
    return (inspect.getdoc(method) or "").partition("\n")[0]


def _arguments(method: Any) -> list[str]:
    """`keep=0.5`, or the bare name of an argument without a default."""
    lines = []
    for field in sorted(dataclasses.fields(method), key=lambda field: field.name == "layers"):  # last: all have it
        if field.default is not dataclasses.MISSING:
            lines.append(f"{field.name}={field.default!r}")
        elif field.default_factory is not dataclasses.MISSING:
            lines.append(f"{field.name}={field.default_factory()!r}")
        else:
            lines.append(field.name)
    return lines


# --- MODEL --------------------------------------------------------------------------------------------------------


def load_target(spec: str, batch: int | None = None) -> Target:
    """The model that `spec` names, in eval mode, and an input for it: (model, args, kwargs).

    Raises OptionError, which says what is wrong with `spec`, when there is no such model or no way to make its input.
    """
    source, colon, name = spec.partition(":")
    if not (source and colon and name):
        raise OptionError(f"MODEL {spec!r} is not of the form module:callable, timm:NAME or transformers:CLASS.")
    load = {"timm": _from_timm, "transformers": _from_transformers}.get(source)
    model, inputs, keywords = load(name, batch or 8) if load else _from_callable(source, name, batch)
    return model.eval(), inputs, keywords


def _import(module: str, spec: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a user's module, or a library half installed, may raise anything
        raise OptionError(f"MODEL {spec!r}: cannot import {module!r}: {type(error).__name__}: {error}") from error


def _from_callable(module: str, name: str, batch: int | None) -> Target:
    from torch import nn

    spec = f"{module}:{name}"
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` has it: a module in the current folder can be named
    loaded = _import(module, spec)
    make = getattr(loaded, name, None)
    if not callable(make):
        known = [key for key, value in vars(loaded).items() if callable(value) and not key.startswith("_")]
        raise OptionError(f"MODEL {spec!r}: {module!r} has no callable {name!r}.{nearest(name, known)}")
    if batch is not None and "batch" not in inspect.signature(make).parameters:
        raise OptionError(
            f"MODEL {spec!r}: --batch needs a callable that takes `batch`; {name}{inspect.signature(make)} does not."
        )
    made = make() if batch is None else make(batch=batch)
    if not (isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module)):
        raise OptionError(
            f"MODEL {spec!r}: {name}() must return (model, args) or (model, args, kwargs), not {type(made).__name__}."
        )
    inputs = made[1] if isinstance(made[1], tuple | list) else (made[1],)
    return made[0], tuple(inputs), dict(made[2]) if len(made) == 3 else {}


def _from_timm(name: str, batch: int) -> Target:
    import torch

    spec = f"timm:{name}"
    timm = _import("timm", spec)
    if not timm.is_model(name):
        raise OptionError(f"MODEL {spec!r}: timm has no model {name!r}.{_nearest_few(name, timm.list_models())}")
    model = timm.create_model(name, pretrained=False)
    shape = model.default_cfg["input_size"]
    return model, (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)),), {}


def _from_transformers(name: str, batch: int) -> Target:
    import torch

    spec = f"transformers:{name}"
    transformers = _import("transformers", spec)
    kind = _attribute(transformers, name, spec)
    if getattr(kind, "config_class", None) is None or not hasattr(kind, "main_input_name"):
        raise OptionError(f"MODEL {spec!r}: {name} is not a model class with a default config (ViTModel is one).")
    config = kind.config_class()
    generator = torch.Generator().manual_seed(0)
    image, words = getattr(config, "image_size", None), getattr(config, "vocab_size", None)
    if kind.main_input_name == "pixel_values" and image is not None:
        height, width = image if isinstance(image, list | tuple) else (image, image)
        value = torch.randn(batch, config.num_channels, height, width, generator=generator)
    elif kind.main_input_name == "input_ids" and words is not None and not config.is_encoder_decoder:
        tokens = min(_TEXT_TOKENS, getattr(config, "max_position_embeddings", None) or _TEXT_TOKENS)
        value = torch.randint(words, (batch, tokens), generator=generator)
    else:
        raise OptionError(
            f"MODEL {spec!r}: no way to guess an input for {kind.main_input_name!r} from {type(config).__name__}. "
            "Write a function that returns (model, args, kwargs) and name it as module:callable."
        )
    return kind(config), (), {kind.main_input_name: value}


def _attribute(transformers: Any, name: str, spec: str) -> Any:
    if name not in dir(transformers):
        raise OptionError(f"MODEL {spec!r}: transformers has no {name!r}.{_nearest_few(name, dir(transformers))}")
    try:
        return getattr(transformers, name)
    except Exception as error:  # transformers imports lazily, and words its own reasons
        raise OptionError(f"MODEL {spec!r}: transformers cannot load {name!r}: {error}") from error


def _nearest_few(name: str, known: Sequence[str]) -> str:
    """`nearest`, for thousands of names that nobody wants to read."""
    return nearest(name, get_close_matches(name, known, n=5, cutoff=0.5) or known[:5])


if __name__ == "__main__":
    sys.exit(main())
