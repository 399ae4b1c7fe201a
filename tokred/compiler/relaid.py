"""Copies of parameters in another layout: made once, used by all graphs, made again when the parameter has changed.

A graph takes such a copy as one more input (`relaid_input`), and a wrapper around the compiled graph hands it in at
each call (`lower_relaid`). So it is never a constant of the compiled code, and a changed parameter costs no recompile.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import string_at
from typing import Any, ClassVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, fx

__all__ = ["Relaid", "keep_sources", "lower_relaid", "neuron_major", "relaid_input", "relaid_inputs", "untracked"]

Compiled = Callable[..., Any]

GLIMPSE = 64  # bytes at each of two places


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
    """The neuron-major copy of one parameter. `Relaid.of(parameter)` finds or makes it.

    Kept as long as the parameter lives, one for each, whoever asks. Its version and address tell whether it changed:
    load_state_dict, an optimiser's step and `parameter.data = ...` do. What is written in place through
    `parameter.data` changes neither: on CPU it is seen where it changes the `glimpse`, as what concerns all of a weight
    does (averages of weights, a LoRA branch merged into them); else by graphs compiled afterwards, or after
    `Relaid.forget()`.
    """

    _all: ClassVar[dict[int, Relaid]] = {}

    def __init__(self, parameter: Tensor) -> None:
        key = id(parameter)
        self.parameter: ReferenceType[Tensor] = ref(parameter, lambda _: Relaid._all.pop(key, None))
        self.copy = torch.empty(0)
        self.state: Any = None  # version, address and strides of the parameter that was copied
        self.glimpse: list[tuple[int, bytes]] = []

    @staticmethod
    def entry(parameter: Tensor, *, anew: bool = False) -> Relaid:
        """The entry for a parameter, up to date; with `anew` the copy is made again in any case.

        Raises ValueError for a parameter whose changes could not be seen.
        """
        found = Relaid._all.get(id(parameter))
        if found is None:
            if reason := untracked(parameter):
                raise ValueError(f"no copy of this {tuple(parameter.shape)} parameter: {reason}")
            found = Relaid._all[id(parameter)] = Relaid(parameter)
        if anew or not found.fits(parameter):
            found._renew(parameter)
        return found

    @staticmethod
    def of(parameter: Tensor) -> Tensor:
        """[I O] contiguous, without gradient: see `neuron_major`. The same tensor at each call."""
        return Relaid.entry(parameter).copy

    @staticmethod
    def total() -> int:
        """Bytes that all copies take."""
        return sum(entry.copy.nbytes for entry in Relaid._all.values())

    @staticmethod
    def forget() -> None:
        """Let every copy be made again at its next use."""
        for entry in Relaid._all.values():
            entry.state = None

    def fits(self, parameter: Any) -> bool:
        """Whether the copy is one of this parameter as it is now."""
        own = self.parameter()
        if own is None or own is not parameter or _state(own) != self.state:
            return False
        return all(string_at(place, len(seen)) == seen for place, seen in self.glimpse)

    def _renew(self, parameter: Tensor) -> None:
        """Copy again, into the same memory where it still fits: recorded CUDA graphs read there."""
        state, glimpse, view = _state(parameter), _glimpse(parameter), neuron_major(parameter.detach())
        with torch.inference_mode(False), torch.no_grad():
            if (view.shape, view.dtype, view.device) == (self.copy.shape, self.copy.dtype, self.copy.device):
                self.copy.copy_(view)
            else:
                self.copy = view.clone(memory_format=torch.contiguous_format)
        self.glimpse = glimpse
        self.state = state  # last: another thread, or a failure, meets no copy half made


def _state(parameter: Tensor) -> tuple[Any, ...]:
    return parameter._version, parameter.data_ptr(), parameter.stride()


def _glimpse(parameter: Tensor) -> list[tuple[int, bytes]]:
    """Two places in the parameter's memory and what is there; none in memory that the host cannot read."""
    size, address = parameter.nbytes, parameter.data_ptr()
    if parameter.device.type != "cpu" or not address or not parameter.is_contiguous():
        return []
    places = (0, size // 2)
    return [(address + place, string_at(address + place, min(GLIMPSE, size - place))) for place in places]


# -- in graphs --------------------------------------------------------------------------------------------------------


def relaid_input(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """The graph's input for the neuron-major copy of the parameter `weight`, itself an input: found, or put last.

    Raises ValueError for a weight that is no input: one that Dynamo or another pass made an attribute of the graph.
    """
    inputs: list[fx.Node] = list(graph.find_nodes(op="placeholder"))
    number = inputs.index(weight)
    for node in inputs:
        if node.meta.get("relaid") == number:
            return node
    with graph.inserting_after(inputs[-1]):
        node = graph.placeholder(f"{weight.name}_relaid")
    fake = weight.meta["val"]
    with fake.fake_mode, torch.no_grad():
        node.meta["val"] = neuron_major(fake.detach()).clone(memory_format=torch.contiguous_format)
    node.meta |= {"relaid": number, "is_parameter": True}
    return node


def relaid_inputs(gm: fx.GraphModule) -> list[int]:
    """For each input that `relaid_input` added, the number of the parameter; they are the last ones."""
    return [node.meta["relaid"] for node in gm.graph.find_nodes(op="placeholder") if "relaid" in node.meta]


def lower_relaid(
    gm: fx.GraphModule, inputs: list[Any], lower: Callable[[fx.GraphModule, list[Any]], Compiled]
) -> Compiled:
    """Lower a graph that may take relaid parameters: the result takes `inputs` alone."""
    numbers = relaid_inputs(gm)
    if not numbers:
        return lower(gm, inputs)
    fakes = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")[-len(numbers) :]]
    return supplied(lower(gm, [*inputs, *fakes]), numbers)  # sizes of a real tensor would become symbols of no source


def keep_sources(graph: fx.GraphModule, gm: fx.GraphModule) -> None:
    """Tell AOTAutograd of the rewritten `graph` what Dynamo tells it of `gm`: which inputs are parameters.

    What CUDA graphs are not told to stay in its place they copy in front of each replay: all weights, and more bytes
    than a method leaves unread. Relaid copies stay as well. Not of graphs with weights of their own as attributes,
    which Dynamo gave no names.
    """
    places = gm.graph.find_nodes(op="placeholder")
    known = "dynamo_compile_id" in gm.meta and all(hasattr(node, "_dynamo_source") for node in places)
    if not known or [*graph.parameters(), *graph.buffers()]:
        return
    added: list[fx.Node] = list(graph.graph.find_nodes(op="placeholder"))
    for old, new in zip(places, added, strict=False):
        new._dynamo_source = old._dynamo_source
        new.meta |= {key: old.meta[key] for key in ("tensor_dict",) if key in old.meta}
    for new in added[len(places) :]:
        new._dynamo_source = None
        if "relaid" in new.meta:
            new.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    graph.meta["dynamo_compile_id"] = gm.meta["dynamo_compile_id"]
    graph._param_name_to_source = {}  # type: ignore[assignment]


def supplied(compiled: Compiled, numbers: list[int]) -> Compiled:
    """`compiled` with the copies of the inputs of these numbers behind its own inputs, looked at anew at each call."""
    known: list[Relaid | None] = [None] * len(numbers)

    def call(*inputs: Any) -> Any:
        copies = []
        for place, number in enumerate(numbers):
            parameter, entry = inputs[number], known[place]
            if entry is None or not entry.fits(parameter):
                entry = known[place] = Relaid.entry(parameter, anew=entry is None)
            copies.append(entry.copy)
        return compiled(*inputs, *copies)

    return call
