"""What is made of parameters once, used by all graphs, and made again when a parameter has changed: copies in another
layout, and whatever else depends on nothing but weights.

A graph takes such a tensor as one more input (`relaid_input`), and a wrapper around the compiled graph hands it in at
each call (`lower_relaid`). So it is never a constant of the compiled code, and a changed parameter costs no recompile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, fx

__all__ = [
    "Relaid",
    "Source",
    "lower_relaid",
    "made_inputs",
    "neuron_major",
    "relaid_input",
    "relaid_inputs",
    "untracked",
]

Compiled = Callable[..., Any]
Make = Callable[..., Any]  # a tensor or a tuple of tensors of parameters; equal ones make the same


def neuron_major(weight: Tensor) -> Tensor:
    """A linear's [O I] -> [I O]; so a convolution's over single positions [O I 1 ..]; of experts [E O I] -> [E I O].

    A view: row i is what input i, or neuron i of an MLP's last linear, adds to the output.
    """
    flat = weight.flatten(1) if weight.dim() > 2 and weight.shape[2:].numel() == 1 else weight
    return flat.mT


def untracked(parameter: Any, *, copied: bool = True) -> str:
    """Why nothing may be made of `parameter`, as half a sentence; "" if it may.

    A copy that stands for it has no gradient to give to it, and changes of an inference tensor leave no trace.
    """
    if copied and torch.is_grad_enabled() and parameter.requires_grad:
        return "the weight's gradient is wanted: call the model under torch.no_grad()"
    if parameter.is_inference():
        return "the weight was made under torch.inference_mode, which does not tell when it changes"
    return ""


class Relaid:
    """What a function makes of some parameters: of one the neuron-major copy, which `Relaid.of(parameter)` finds or
    makes.

    Kept as long as the parameters live, one for each function, whoever asks. `version` and the address tell whether
    they changed: load_state_dict, an optimiser's step and `parameter.data = ...` do; what is written through
    `parameter.data` in place changes neither, and is seen after `Relaid.forget()` alone.
    """

    _all: ClassVar[dict[tuple[Any, ...], Relaid]] = {}

    def __init__(self, make: Make, parameters: tuple[Tensor, ...], key: tuple[Any, ...]) -> None:
        self.make = make
        self.parameters: list[ReferenceType[Tensor]] = [
            ref(parameter, lambda _: Relaid._all.pop(key, None)) for parameter in parameters
        ]
        self.copies: list[Tensor] = []
        self.seen: list[tuple[int, int]] = []

    @staticmethod
    def entry(*parameters: Tensor, make: Make = neuron_major) -> Relaid:
        """The entry for parameters, up to date. Raises ValueError for one whose changes could not be seen."""
        key = (make, *map(id, parameters))
        found = Relaid._all.get(key)
        if found is None:
            for parameter in parameters:
                if reason := untracked(parameter, copied=make is neuron_major):
                    raise ValueError(f"no copy of this {tuple(parameter.shape)} parameter: {reason}")
            found = Relaid._all[key] = Relaid(make, parameters, key)
        if not found.fits(*parameters):
            found._renew(parameters)
        return found

    @staticmethod
    def of(parameter: Tensor) -> Tensor:
        """[I O] contiguous, without gradient: see `neuron_major`. The same tensor at each call."""
        return Relaid.entry(parameter).copies[0]

    @staticmethod
    def total() -> int:
        """Bytes that all of it takes."""
        return sum(copy.nbytes for entry in Relaid._all.values() for copy in entry.copies)

    @staticmethod
    def forget() -> None:
        """Let everything be made again at its next use."""
        for entry in Relaid._all.values():
            entry.seen = []

    def fits(self, *parameters: Any) -> bool:
        """Whether it was made of these parameters as they are now."""
        for known, seen, parameter in zip(self.parameters, self.seen, parameters, strict=False):
            if seen != (parameter._version, parameter.data_ptr()) or known() is not parameter:
                return False
        return bool(self.seen)

    def _renew(self, parameters: tuple[Tensor, ...]) -> None:
        """Make it again, in the same memory where it still fits: recorded CUDA graphs read there."""
        with torch.inference_mode(False), torch.no_grad():
            made = self.make(*(parameter.detach() for parameter in parameters))
            made = (made,) if isinstance(made, Tensor) else made
            if [(m.shape, m.dtype, m.device) for m in made] == [(c.shape, c.dtype, c.device) for c in self.copies]:
                for copy, new in zip(self.copies, made, strict=True):
                    copy.copy_(new)
            else:
                self.copies = [new.clone(memory_format=torch.contiguous_format) for new in made]
        self.seen = [(parameter._version, parameter.data_ptr()) for parameter in parameters]


# -- in graphs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where an input comes from: the numbers of the parameters, what is made of them, which tensor of that it is."""

    numbers: tuple[int, ...]
    make: Make = neuron_major
    which: int = 0


def relaid_input(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """The graph's input for the neuron-major copy of the parameter `weight`, itself an input: found, or put last.

    Raises ValueError for a weight that is no input: one that Dynamo or another pass made an attribute of the graph.
    """
    if weight.op != "placeholder":
        raise ValueError(f"{weight.name} is no input of the graph")
    fake = weight.meta["val"]
    with fake.fake_mode, torch.no_grad():
        like = neuron_major(fake.detach()).clone(memory_format=torch.contiguous_format)
    return made_inputs(graph, (weight,), neuron_major, [like])[0]


def made_inputs(graph: fx.Graph, weights: tuple[fx.Node, ...], make: Make, like: list[Tensor]) -> list[fx.Node]:
    """The graph's inputs for the tensors that `make` makes of parameters, themselves inputs; `like` these fake ones."""
    found = []
    for which, fake in enumerate(like):
        inputs: list[fx.Node] = list(graph.find_nodes(op="placeholder"))
        source = Source(tuple(inputs.index(weight) for weight in weights), make, which)
        node = next((node for node in inputs if node.meta.get("relaid") == source), None)
        if node is None:
            with graph.inserting_after(inputs[-1]):
                node = graph.placeholder(f"{weights[0].name}_relaid_{len(inputs)}")
            node.meta |= {"val": fake, "relaid": source, "is_parameter": True}
        found.append(node)
    return found


def relaid_inputs(gm: fx.GraphModule) -> list[Source]:
    """Where each of the inputs that were added comes from; they are the last ones."""
    return [node.meta["relaid"] for node in gm.graph.find_nodes(op="placeholder") if "relaid" in node.meta]


def lower_relaid(
    gm: fx.GraphModule, inputs: list[Any], lower: Callable[[fx.GraphModule, list[Any]], Compiled]
) -> Compiled:
    """Lower a graph that may take relaid parameters: the result takes `inputs` alone."""
    sources = relaid_inputs(gm)
    if not sources:
        return lower(gm, inputs)
    fakes = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")[-len(sources) :]]
    return supplied(lower(gm, [*inputs, *fakes]), sources)  # sizes of a real tensor would become symbols of no source


def supplied(compiled: Compiled, sources: list[Source]) -> Compiled:
    """`compiled` with what these sources say behind its own inputs, looked at anew at each call."""
    known: list[Relaid | None] = [None] * len(sources)

    def call(*inputs: Any) -> Any:
        copies = []
        for place, source in enumerate(sources):
            parameters, entry = [inputs[number] for number in source.numbers], known[place]
            if entry is None or not entry.fits(*parameters):
                entry = known[place] = Relaid.entry(*parameters, make=source.make)
            copies.append(entry.copies[source.which])
        return compiled(*inputs, *copies)

    return call
