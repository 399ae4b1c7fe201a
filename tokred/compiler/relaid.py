"""Tensors made from parameters, such as a copy in another layout: made once, used by all graphs, and made again when a
parameter has changed.

A graph takes such a tensor as one more input (`made_input`), and a wrapper around the compiled graph hands it in at
each call (`lower_relaid`). So it is never a constant of the compiled code, and a changed parameter costs no recompile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, fx

__all__ = [
    "Made",
    "Relaid",
    "erase_unused_copies",
    "held",
    "lower_relaid",
    "made_input",
    "neuron_major",
    "relaid_input",
    "relaid_inputs",
    "untracked",
    "values_of",
]

log = logging.getLogger("tokred")

Compiled = Callable[..., Any]
Make = Callable[..., Tensor]  # hashable, and equal to another that makes the same of the same parameters


def neuron_major(weight: Tensor) -> Tensor:
    """A linear's [O I] -> [I O]; so a convolution's over single positions [O I 1 ..]; of experts [E O I] -> [E I O].

    A view: row i is what input i, or neuron i of an MLP's last linear, adds to the output.
    """
    flat = weight.flatten(1) if weight.dim() > 2 and weight.shape[2:].numel() == 1 else weight
    return flat.mT


def untracked(parameter: Any) -> str:
    """Why no copy of `parameter` may stand for it, as half a sentence; "" if one may.

    A copy has no gradient to give to its parameter, and changes of an inference tensor leave no trace.
    """
    if torch.is_grad_enabled() and parameter.requires_grad:
        return "the weight's gradient is wanted: call the model under torch.no_grad()"
    if parameter.is_inference():
        return "the weight was made under torch.inference_mode, which does not tell when it changes"
    return ""


class Relaid:
    """What `make` makes of some parameters, once for all. `Relaid.entry(make, *parameters)` finds or makes it.

    Kept as long as all of the parameters live, one for each `make`, whoever asks. Their versions and addresses tell
    whether they changed: load_state_dict, an optimiser's step and `parameter.data = ...` do; what is written through
    `parameter.data` in place changes neither, and is seen after `Relaid.forget()` alone.
    """

    _all: ClassVar[dict[tuple[Any, ...], Relaid]] = {}

    def __init__(self, make: Make, parameters: Sequence[Tensor]) -> None:
        key = (make, *map(id, parameters))
        self.make = make
        self.parameters: list[ReferenceType[Tensor]] = [
            ref(parameter, lambda _: Relaid._all.pop(key, None)) for parameter in parameters
        ]
        self.copy = torch.empty(0)
        self.states: list[tuple[int, int]] = [(-1, 0)] * len(parameters)

    @staticmethod
    def entry(make: Make, *parameters: Tensor) -> Relaid:
        """The entry for these parameters, up to date. Raises ValueError for one whose changes could not be seen."""
        key = (make, *map(id, parameters))
        found = Relaid._all.get(key)
        if found is None:
            for parameter in parameters:
                if reason := untracked(parameter):
                    raise ValueError(f"no copy of this {tuple(parameter.shape)} parameter: {reason}")
            found = Relaid._all[key] = Relaid(make, parameters)
        if not found.fits(*parameters):
            found._renew(parameters)
        return found

    @staticmethod
    def of(parameter: Tensor) -> Tensor:
        """[I O] contiguous, without gradient: see `neuron_major`. The same tensor at each call."""
        return Relaid.entry(neuron_major, parameter).copy

    @staticmethod
    def total() -> int:
        """Bytes that all copies take."""
        return sum(entry.copy.nbytes for entry in Relaid._all.values())

    @staticmethod
    def forget() -> None:
        """Let every copy be made again at its next use."""
        for entry in Relaid._all.values():
            entry.states = [(-1, 0)] * len(entry.states)

    def fits(self, *parameters: Any) -> bool:
        """Whether the copy is one of these parameters as they are now."""
        known: Any = zip(self.parameters, self.states, parameters, strict=True)
        return all(own() is p and (p._version, p.data_ptr()) == state for own, state, p in known)

    def _renew(self, parameters: Sequence[Tensor]) -> None:
        """Make it again, in the same memory where it still fits: recorded CUDA graphs read there."""
        self.states = [(parameter._version, parameter.data_ptr()) for parameter in parameters]
        with torch.inference_mode(False), torch.no_grad():
            made = self.make(*(parameter.detach() for parameter in parameters))
            if (made.shape, made.dtype, made.device) == (self.copy.shape, self.copy.dtype, self.copy.device):
                self.copy.copy_(made)
            else:
                self.copy = made.clone(memory_format=torch.contiguous_format)


# -- in graphs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What an input of a graph is: `make` of the inputs with these numbers, which are parameters."""

    numbers: tuple[int, ...]
    make: Make


@dataclass(frozen=True)
class Then:
    """`second` of what `first` makes."""

    first: Make
    second: Make

    def __call__(self, *parameters: Tensor) -> Tensor:
        return self.second(self.first(*parameters))


def made_input(graph: fx.Graph, parameters: Sequence[fx.Node], make: Make, like: Tensor, name: str) -> fx.Node:
    """The graph's input for what `make` makes of parameters, inputs too: found, or put last. `like` is it, but fake.

    Raises ValueError for a parameter that is no input: one that Dynamo or another pass made an attribute of the graph.
    """
    inputs: list[fx.Node] = list(graph.find_nodes(op="placeholder"))
    made = Made(tuple(inputs.index(node) for node in parameters), make)
    for node in inputs:
        if node.meta.get("relaid") == made:
            return node
    with graph.inserting_after(inputs[-1]):
        node = graph.placeholder(name)
    node.meta |= {"val": like, "relaid": made, "is_parameter": True, "parameter": parameters[0].meta.get("parameter")}
    return node


def relaid_input(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """The graph's input for the neuron-major copy of the parameter `weight`, itself an input, maybe a made one."""
    inputs: list[fx.Node] = list(graph.find_nodes(op="placeholder"))
    before: Made | None = weight.meta.get("relaid")
    numbers = (inputs.index(weight),) if before is None else before.numbers
    fake = weight.meta["val"]
    with fake.fake_mode, torch.no_grad():
        like = neuron_major(fake.detach()).clone(memory_format=torch.contiguous_format)
    make = neuron_major if before is None else Then(before.make, neuron_major)
    return made_input(graph, [inputs[number] for number in numbers], make, like, f"{weight.name}_relaid")


def relaid_inputs(gm: fx.GraphModule) -> list[Made]:
    """What each input that `made_input` added is; they are the last ones."""
    return [node.meta["relaid"] for node in gm.graph.find_nodes(op="placeholder") if "relaid" in node.meta]


def erase_unused_copies(graph: fx.Graph) -> None:
    """Leave out added inputs that nothing reads any more: they would take memory."""
    for node in graph.find_nodes(op="placeholder"):
        if "relaid" in node.meta and not node.users:
            graph.erase_node(node)


def held(gm: fx.GraphModule) -> list[str]:
    """What the added inputs take, for the report: a line for what is laid out anew, and one for what is computed."""
    lines = []
    inputs = [node for node in gm.graph.find_nodes(op="placeholder") if "relaid" in node.meta]
    anew, computed = "are kept a second time, neuron by neuron", "are held beside those that they are made of"
    for words, relays in ((anew, True), (computed, False)):
        sizes = [node.meta["val"].nbytes for node in inputs if _relays(node.meta["relaid"].make) == relays]
        if sizes:
            lines.append(f"{len(sizes)} weights {words}: {sum(sizes) / 2**20:.1f} MiB")
    return lines


def _relays(make: Make) -> bool:
    return make is neuron_major or (isinstance(make, Then) and make.second is neuron_major)


def values_of(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """By placeholder what the graph is called with; for an added input the first parameter that it is made of."""
    places = gm.graph.find_nodes(op="placeholder")
    values = dict(zip(places, inputs, strict=False))
    return values | {node: inputs[node.meta["relaid"].numbers[0]] for node in places if "relaid" in node.meta}


def lower_relaid(
    gm: fx.GraphModule, inputs: list[Any], lower: Callable[[fx.GraphModule, list[Any]], Compiled]
) -> Compiled:
    """Lower a graph that may take relaid parameters: the result takes `inputs` alone."""
    made = relaid_inputs(gm)
    if not made:
        return lower(gm, inputs)
    fakes = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")[-len(made) :]]
    compiled = lower(gm, [*inputs, *fakes])  # sizes of a real tensor would become symbols of no source
    shapes = {len(inputs) + place: fakes[place].shape for place, each in enumerate(made) if _varies(each.make)}
    return supplied(_while_it_fits(compiled, gm, shapes) if shapes else compiled, made)


def _varies(make: Make) -> bool:
    """Whether the size of what is made depends on the parameters' values: `varies = True` says so."""
    return bool(getattr(make, "varies", False))


def _while_it_fits(compiled: Compiled, gm: fx.GraphModule, shapes: Mapping[int, Any]) -> Compiled:
    """`compiled` while the inputs of these numbers have these shapes; else the graph as it stands, uncompiled."""
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


def supplied(compiled: Compiled, made: Sequence[Made]) -> Compiled:
    """`compiled` with what is made behind its own inputs, looked up anew at each call."""
    known: list[Relaid | None] = [None] * len(made)

    def call(*inputs: Any) -> Any:
        copies = []
        for place, each in enumerate(made):
            parameters, entry = [inputs[number] for number in each.numbers], known[place]
            if entry is None or not entry.fits(*parameters):
                entry = known[place] = Relaid.entry(each.make, *parameters)
            copies.append(entry.copy)
        return compiled(*inputs, *copies)

    return call
