"""Tensors made of parameters, such as a copy in another layout: made once, used by all graphs, and made again when a
parameter has changed.

A graph takes such tensors as more inputs (`made_inputs`; extras.py says how they get there). So they are never
constants of the compiled code, and a changed parameter costs no recompile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from ctypes import string_at
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, fx

from tokred.compiler.extras import Extra, extra_input

__all__ = [
    "Relaid",
    "RelaidInput",
    "erase_unused_copies",
    "held",
    "made_inputs",
    "neuron_major",
    "relaid_input",
    "untracked",
    "values_of",
    "while_it_fits",
]

log = logging.getLogger("tokred")

Make = Callable[..., Any]  # of parameters a tensor or a tuple of them; hashable, and equal ones make the same

GLIMPSE = 64  # bytes at each of two places


def neuron_major(weight: Tensor) -> Tensor:
    """A linear's [O I] -> [I O]; so a convolution's over single positions [O I 1 ..]; of experts [E O I] -> [E I O].

    A view: row i is what input i, or neuron i of an MLP's last linear, adds to the output.
    """
    flat = weight.flatten(1) if weight.dim() > 2 and weight.shape[2:].numel() == 1 else weight
    return flat.mT


def untracked(parameter: Any, *, copied: bool = True) -> str:
    """Why nothing may be made of `parameter`, as half a sentence; "" if it may.

    What stands for it (a copy) has no gradient to give to it, and changes of an inference tensor leave no trace.
    """
    if copied and torch.is_grad_enabled() and parameter.requires_grad:
        return "the weight's gradient is wanted: call the model under torch.no_grad()"
    if parameter.is_inference():
        return "the weight was made under torch.inference_mode, which does not tell when it changes"
    return ""


class Relaid:
    """What `make` makes of some parameters, once for all. `Relaid.entry(make, *parameters)` finds or makes it.

    Kept as long as all of the parameters live, one for each `make`, whoever asks. Versions and addresses tell whether a
    parameter changed: load_state_dict, an optimiser's step and `parameter.data = ...` do. What is written in place
    through `parameter.data` changes neither: on CPU it is seen where it changes the `glimpse`, as what concerns all of
    a weight does (averages of weights, a LoRA branch merged into them); else by graphs compiled afterwards, or after
    `Relaid.forget()`.
    """

    _all: ClassVar[dict[tuple[Any, ...], Relaid]] = {}

    def __init__(self, make: Make, parameters: Sequence[Tensor]) -> None:
        key = (make, *map(id, parameters))
        self.make = make
        self.parameters: list[ReferenceType[Tensor]] = [
            ref(parameter, lambda _: Relaid._all.pop(key, None)) for parameter in parameters
        ]
        self.copies: list[Tensor] = []
        self.states: list[Any] = [None] * len(parameters)  # version, address and strides of what it was made of
        self.glimpse: list[tuple[int, bytes]] = []

    @staticmethod
    def entry(make: Make, *parameters: Tensor, anew: bool = False) -> Relaid:
        """The entry for these parameters, up to date; with `anew` it is made again in any case.

        Raises ValueError for a parameter whose changes could not be seen.
        """
        key = (make, *map(id, parameters))
        found = Relaid._all.get(key)
        if found is None:
            for parameter in parameters:
                if reason := untracked(parameter, copied=getattr(make, "copies", True)):
                    raise ValueError(f"no copy of this {tuple(parameter.shape)} parameter: {reason}")
            found = Relaid._all[key] = Relaid(make, parameters)
        if anew or not found.fits(*parameters):
            found._renew(parameters)
        return found

    @staticmethod
    def of(parameter: Tensor) -> Tensor:
        """[I O] contiguous, without gradient: see `neuron_major`. The same tensor at each call."""
        return Relaid.entry(neuron_major, parameter).copies[0]

    @staticmethod
    def total() -> int:
        """Bytes that all of it takes."""
        return sum(copy.nbytes for entry in Relaid._all.values() for copy in entry.copies)

    @staticmethod
    def forget() -> None:
        """Let everything be made again at its next use."""
        for entry in Relaid._all.values():
            entry.states = [None] * len(entry.states)

    def fits(self, *parameters: Any) -> bool:
        """Whether it was made of these parameters as they are now."""
        known: Any = zip(self.parameters, self.states, parameters, strict=True)
        if not all(own() is parameter and _state(parameter) == state for own, state, parameter in known):
            return False
        return all(string_at(place, len(seen)) == seen for place, seen in self.glimpse)

    def _renew(self, parameters: Sequence[Tensor]) -> None:
        """Make it again, in the same memory where it still fits: recorded CUDA graphs read there."""
        states = [_state(parameter) for parameter in parameters]
        glimpse = [place for parameter in parameters for place in _glimpse(parameter)]
        with torch.inference_mode(False), torch.no_grad():
            made = self.make(*(parameter.detach() for parameter in parameters))
            made = (made,) if isinstance(made, Tensor) else made
            if [(new.shape, new.dtype, new.device) for new in made] == [
                (c.shape, c.dtype, c.device) for c in self.copies
            ]:
                for copy, new in zip(self.copies, made, strict=True):
                    copy.copy_(new)
            else:
                self.copies = [new.clone(memory_format=torch.contiguous_format) for new in made]
        self.glimpse = glimpse
        self.states = states  # last: another thread, or a failure, meets nothing half made


def _state(parameter: Any) -> tuple[Any, ...]:
    return parameter._version, parameter.data_ptr(), parameter.stride()


def _glimpse(parameter: Tensor) -> list[tuple[int, bytes]]:
    """Two places in the parameter's memory and what is there; none in memory that the host cannot read."""
    size, address = parameter.nbytes, parameter.data_ptr()
    if parameter.device.type != "cpu" or not address or not parameter.is_contiguous():
        return []
    places = (0, size // 2)
    return [(address + place, string_at(address + place, min(GLIMPSE, size - place))) for place in places]


# -- in graphs --------------------------------------------------------------------------------------------------------


class RelaidInput(Extra):
    """Inputs of a graph: what `make` makes of those with these numbers, parameters. Looked up at each call."""

    stays = True

    def __init__(self, numbers: tuple[int, ...], make: Make):
        self.numbers, self.make = numbers, make
        self._known: Relaid | None = None

    def give(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        parameters, known = [inputs[number] for number in self.numbers], self._known
        if known is None or not known.fits(*parameters):
            known = self._known = Relaid.entry(self.make, *parameters, anew=known is None)
        return known.copies


@dataclass(frozen=True)
class Then:
    """`second` of what `first` makes."""

    first: Make
    second: Make

    def __call__(self, *parameters: Tensor) -> Any:
        return self.second(self.first(*parameters))


def made_inputs(
    graph: fx.Graph, parameters: Sequence[fx.Node], make: Make, like: Sequence[Tensor], name: str
) -> list[fx.Node]:
    """The graph's inputs for what `make` makes of parameters, inputs too: found, or put last. `like` is it, but fake.

    Raises ValueError for a parameter that is no input: one that Dynamo or another pass made an attribute of the graph.
    """
    inputs: list[fx.Node] = list(graph.find_nodes(op="placeholder"))
    numbers = tuple(inputs.index(node) for node in parameters)
    found = [node for node in _added(graph) if (node.meta["extra"].numbers, node.meta["extra"].make) == (numbers, make)]
    if found:
        return found
    extra = RelaidInput(numbers, make)
    made = [extra_input(graph, name, extra, fake) for fake in like]
    for node in made:
        node.meta |= {"is_parameter": True, "parameter": parameters[0].meta.get("parameter")}
    return made


def relaid_input(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """The graph's input for the neuron-major copy of the parameter `weight`, itself an input, maybe a made one.

    Raises ValueError for a weight that is no input, as `made_inputs` does.
    """
    if weight.op != "placeholder":
        raise ValueError(f"{weight.name} is no input of the graph")
    inputs: list[fx.Node] = list(graph.find_nodes(op="placeholder"))
    before = weight.meta.get("extra")
    parameters = [weight] if before is None else [inputs[number] for number in before.numbers]
    fake = weight.meta["val"]
    with fake.fake_mode, torch.no_grad():
        like = neuron_major(fake.detach()).clone(memory_format=torch.contiguous_format)
    make = neuron_major if before is None else Then(before.make, neuron_major)
    return made_inputs(graph, parameters, make, [like], f"{weight.name}_relaid")[0]


def erase_unused_copies(graph: fx.Graph) -> None:
    """Leave out added inputs that nothing reads any more: they would take memory."""
    used = {id(node.meta["extra"]) for node in _added(graph) if node.users}
    for node in _added(graph):
        if id(node.meta["extra"]) not in used:
            graph.erase_node(node)


def _added(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.find_nodes(op="placeholder") if isinstance(node.meta.get("extra"), RelaidInput)]


def held(gm: fx.GraphModule) -> list[str]:
    """What the added inputs take, for the report: a line for what is laid out anew, and one for what is computed."""
    lines = []
    anew, computed = "are kept a second time, neuron by neuron", "are held beside those that they are made of"
    for words, relays in ((anew, True), (computed, False)):
        sizes = [node.meta["val"].nbytes for node in _added(gm.graph) if _relays(node.meta["extra"].make) == relays]
        if sizes:
            lines.append(f"{len(sizes)} weights {words}: {sum(sizes) / 2**20:.1f} MiB")
    return lines


def _relays(make: Make) -> bool:
    return make is neuron_major or (isinstance(make, Then) and make.second is neuron_major)


def values_of(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """By placeholder what the graph is called with; for an added input the first parameter that it is made of."""
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=False))  # what is carried is behind them
    return values | {node: inputs[node.meta["extra"].numbers[0]] for node in _added(gm.graph)}


def while_it_fits(compiled: Callable[..., Any], gm: fx.GraphModule) -> Callable[..., Any]:
    """`compiled` while what is made of parameters has the sizes that it was compiled for; else the graph, uncompiled.

    The sizes depend on the parameters' values where `make.varies` says so.
    """
    places = gm.graph.find_nodes(op="placeholder")
    added = [node for node in _added(gm.graph) if getattr(node.meta["extra"].make, "varies", False)]
    shapes = {places.index(node): node.meta["val"].shape for node in added}
    if not shapes:
        return compiled
    warned = False

    def call(*inputs: Any) -> Any:
        nonlocal warned
        if all(inputs[number].shape == shape for number, shape in shapes.items()):
            return compiled(*inputs)
        if not warned:
            log.warning("parameters have outgrown what was compiled: it runs uncompiled until torch.compiler.reset()")
            warned = True
        return gm.forward(*inputs)

    return call
