"""How the dimensions of an op's inputs and outputs belong together: the vocabulary of the op rules.

A rule describes one node as a list of relations between *slots*. A slot is one dimension of one tensor argument; an
output slot is one dimension of one result. What a rule does not mention is mixed by the op in a way it cannot express.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

__all__ = [
    "Flow",
    "Join",
    "Kind",
    "Link",
    "Op",
    "Reshape",
    "Size",
    "Slot",
    "Window",
    "each",
    "einlinks",
    "flow_of",
    "has_rule",
    "pointwise",
    "rule",
    "same",
]

Size = Any  # int | torch.SymInt


class Slot(NamedTuple):
    """One dimension of one tensor argument: the argument's schema name, its place in a list argument, the dimension."""

    name: str
    item: int
    dim: int


class Kind(enum.Enum):
    """What an op does along the dimensions that a Link relates."""

    EACH = "each"  # output i depends on input i alone
    CONTRACT = "contract"  # summed over a product of two or more inputs
    MEAN = "mean"
    SUM = "sum"
    MAX = "max"  # or min, any, all: idempotent, so copies do not matter
    ATTEND = "attend"  # summed with weights that the op itself normalises along it (SDPA's keys)
    SOFTMAX = "softmax"  # normalised along the dimension, one output per input


class Link(NamedTuple):
    """These dimensions run over the same index."""

    kind: Kind
    ins: tuple[Slot, ...]
    outs: tuple[tuple[int, int], ...] = ()  # (result, dimension)
    broadcast: tuple[Slot, ...] = ()  # size-one dimensions that stretch over this index; -1 is one before the first


class Window(NamedTuple):
    """Rows [start, stop) of an input dimension; `out` is None where the dimension is dropped (select)."""

    source: Slot
    start: Size
    stop: Size
    out: tuple[int, int] | None


class Join(NamedTuple):
    """Concatenation: the parts, in order, make up the output dimension."""

    parts: tuple[Slot, ...]
    out: tuple[int, int]


class Reshape(NamedTuple):
    """The result is the argument's elements in the same order, in another shape."""

    name: str


Flow = Sequence[Link | Window | Join | Reshape]


class Op:
    """A call of an ATen op with its arguments bound to the schema's names."""

    def __init__(self, node: fx.Node):
        self.node = node
        self.target: Any = node.target
        self.arguments = _bind(node)
        value = node.meta.get("val")
        self.results: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def tensors(self) -> list[tuple[str, int, fx.Node]]:
        """Every tensor argument: schema name, place in a list, node."""
        found = []
        for name, value in self.arguments.items():
            values = value if isinstance(value, (list, tuple)) else [value]
            for index, item in enumerate(values):
                if isinstance(item, fx.Node) and isinstance(item.meta.get("val"), torch.Tensor):
                    found.append((name, index, item))
        return found

    def operand(self, name: str, index: int = 0) -> fx.Node:
        value = self.arguments[name]
        node: fx.Node = value[index] if isinstance(value, (list, tuple)) else value
        return node

    def shape(self, name: str, index: int = 0) -> tuple[Size, ...]:
        return tuple(self.operand(name, index).meta["val"].shape)

    def out_shape(self, result: int = 0) -> tuple[Size, ...]:
        return tuple(self.results[result].shape)

    def number(self, name: str) -> Any:
        """An argument as a plain or symbolic number."""
        value = self.arguments[name]
        return value.meta["val"] if isinstance(value, fx.Node) else value

    def dim(self, name: str = "dim", of: str = "self") -> int:
        return int(self.number(name)) % max(len(self.shape(of)), 1)


def _bind(node: fx.Node) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {f"arg{i}": value for i, value in enumerate(node.args)} | dict(node.kwargs)
    bound = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


Rule = Callable[[Op], Flow]
_RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of these ATen overloads, or of all overloads of these packets."""

    def add(function: Rule) -> Rule:
        for target in targets:
            overloads = [getattr(target, o) for o in target.overloads()] if hasattr(target, "overloads") else [target]
            for overload in overloads:
                _RULES[overload] = function
        return function

    return add


def flow_of(op: Op) -> Flow | None:
    """The relations of one op, or None where no rule knows it (the op is opaque)."""
    known = _RULES.get(op.target)
    if known is not None:
        return known(op)
    if torch.Tag.pointwise in getattr(op.target, "tags", ()):
        return pointwise(op)
    return None


def has_rule(target: Any) -> bool:
    return target in _RULES or torch.Tag.pointwise in getattr(target, "tags", ())


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are known to be equal, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def pointwise(op: Op) -> Flow:
    """[.. a ..] [.. a|1 ..] -> [.. a ..], aligned from the right."""
    shapes = [(name, index, node.meta["val"].shape) for name, index, node in op.tensors()]
    out = op.out_shape()
    links = []
    for dim, size in enumerate(out):
        over: list[Slot] = []
        stretched: list[Slot] = []
        for name, index, shape in shapes:
            at = dim - len(out) + len(shape)  # below zero: so many dimensions before the first
            if at >= 0 and same(shape[at], size):
                over.append(Slot(name, index, at))
            elif at < 0 or same(shape[at], 1):
                stretched.append(Slot(name, index, at))
        if over:
            links.append(Link(Kind.EACH, tuple(over), ((0, dim),), tuple(stretched)))
    return links


def einlinks(op: Op, ins: dict[str, str], out: str, result: int = 0) -> list[Link]:
    """Relations in einsum's notation: `*` are leading dimensions that broadcast, a letter only in inputs is contracted.

    Dimensions of size one that broadcast against larger ones belong to no index and are left out.
    """
    out_names = _names(out, len(op.out_shape(result)))
    sizes = dict(zip(out_names, op.out_shape(result), strict=True))
    slots: dict[str, list[Slot]] = {}
    stretched: dict[str, list[Slot]] = {letter: [] for letter in out_names}
    for name, index, node in op.tensors():
        if name not in ins:
            continue
        shape = tuple(node.meta["val"].shape)
        letters = _names(ins[name], len(shape))
        for dim, letter in enumerate(letters):
            if letter in sizes and not same(shape[dim], sizes[letter]):
                if same(shape[dim], 1):
                    stretched[letter].append(Slot(name, index, dim))
                continue  # broadcast, or (grouped heads) another index altogether
            slots.setdefault(letter, []).append(Slot(name, index, dim))
        missing = (
            [letter for letter in out_names if letter.startswith("*") and letter not in letters]
            if "*" in ins[name]
            else []
        )
        for before, letter in enumerate(reversed(missing), 1):
            stretched[letter].append(Slot(name, index, -before))
    links = []
    for letter, found in slots.items():
        if letter in sizes:
            place = ((result, out_names.index(letter)),)
            links.append(Link(Kind.EACH, tuple(found), place, tuple(stretched[letter])))
        else:
            links.append(Link(Kind.CONTRACT, tuple(found)))
    return links


def _names(spec: str, rank: int) -> list[str]:
    """`"* n d"` for rank 4 -> ["*2", "*1", "n", "d"]: leading dimensions are counted from the right."""
    parts = spec.split()
    if "*" not in parts:
        return parts[len(parts) - rank :]
    star = parts.index("*")
    count = rank - (len(parts) - 1)
    if count < 0:
        return parts[len(parts) - rank :]
    return parts[:star] + [f"*{count - i}" for i in range(count)] + parts[star + 1 :]


def each(op: Op, mapping: dict[int, int], name: str = "self", result: int = 0) -> list[Link]:
    """Input dimension i is output dimension mapping[i]."""
    return [Link(Kind.EACH, (Slot(name, 0, i),), ((result, o),)) for i, o in mapping.items()]
