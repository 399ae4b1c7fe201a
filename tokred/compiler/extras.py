"""What a compiled graph takes behind the model's own inputs, and gives behind its own results: one way for all.

A pass adds such an input with `extra_input`, behind all that are there, and such results behind all that are there.
Each belongs to an `Extra`, which a wrapper around the compiled graph (`with_extras`) asks for the inputs of a call, and
hands the results of that call. Dynamo knows nothing of them: what they hold may change from call to call, and nothing
is compiled again. Copies of parameters in another layout come this way (relaid.py), what a method carries from one call
to the next (memory.py), what a prompt tells the decoding (requests.py), and what caches are told (caches.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

__all__ = ["Extra", "extra_input", "extras_of", "fakes_of", "keep_sources", "supplier", "with_extras"]

Compiled = Callable[..., Any]


class Extra:
    """Some of a graph's extra inputs, or of its extra results, or both: those that one purpose has.

    results   how many of the results it takes
    stays     whether its inputs lie in the same memory at each call of one thread
    """

    results: int = 0
    stays: bool = False

    def ready(self) -> bool:
        """Whether there is something to give in this call; if not, the graph is not called, but the one without it."""
        return True

    def give(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        """Its inputs of a call whose own inputs are these, in the order in which they were added."""
        return ()

    def fresh(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        """The same for a call that no other follows and that is to leave no trace."""
        return self.give(inputs)

    def take(self, own: Sequence[Any], more: Sequence[Any]) -> None:
        """What a call gave: the model's own results, and this one's."""


def extra_input(graph: fx.Graph, name: str, extra: Extra, fake: Tensor) -> fx.Node:
    """A new input of the graph, behind all others. `fake` is what is known of it."""
    inputs: list[fx.Node] = list(graph.find_nodes(op="placeholder"))
    with graph.inserting_after(inputs[-1]):
        node = graph.placeholder(f"{name}_{len(inputs)}")  # an argument of a function, so no other may have the name
    node.meta = {"val": fake, "extra": extra}
    return node


def extras_of(gm: fx.GraphModule) -> list[Extra]:
    """Whose the extra inputs of a graph are, each once."""
    return list(dict.fromkeys(_owners(gm)))


def fakes_of(gm: fx.GraphModule) -> list[Tensor]:
    """The extra inputs themselves, as fake tensors: sizes of real ones would become symbols of no source."""
    return [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder") if "extra" in node.meta]


def supplier(gm: fx.GraphModule, *, fresh: bool = False) -> Callable[[Sequence[Any]], list[Tensor]]:
    """From the model's own inputs of a call to the extra ones; `fresh`: see Extra."""
    owners = _owners(gm)
    extras = list(dict.fromkeys(owners))
    grouped = [place for extra in extras for place, owner in enumerate(owners) if owner is extra]
    places = sorted(range(len(grouped)), key=grouped.__getitem__)  # those of several passes may take turns

    def supply(inputs: Sequence[Any]) -> list[Tensor]:
        given = [x for extra in extras for x in (extra.fresh(inputs) if fresh else extra.give(inputs))]
        return [given[place] for place in places]

    return supply


def _owners(gm: fx.GraphModule) -> list[Extra]:
    return [node.meta["extra"] for node in gm.graph.find_nodes(op="placeholder") if "extra" in node.meta]


def with_extras(
    compiled: Compiled, gm: fx.GraphModule, taking: Sequence[Extra] = (), own: int = 0, otherwise: Any = None
) -> Compiled:
    """`compiled`, made of `gm`, as the model's own graph is called: its inputs in, its results out.

    taking      whose the extra results are, in their order; behind the model's `own` ones
    otherwise   what is called where an extra has nothing to give
    """
    extras, supply = extras_of(gm), supplier(gm)
    if not extras and not taking:
        return compiled

    def call(*inputs: Any) -> Any:
        if otherwise is not None and not all(extra.ready() for extra in extras):
            return otherwise(*inputs)
        results = compiled(*inputs, *supply(inputs))
        if not taking:
            return results
        place = own
        for extra in taking:
            extra.take(results[:own], results[place : place + extra.results])
            place += extra.results
        return results[:own]

    return call


def keep_sources(graph: fx.GraphModule, gm: fx.GraphModule) -> None:
    """Tell AOTAutograd of the rewritten `graph` what Dynamo tells it of `gm`: which inputs are parameters.

    What CUDA graphs are not told to stay in its place they copy in front of each replay: all weights, and more bytes
    than a method leaves unread. Not of graphs with weights of their own as attributes, which Dynamo gave no names.
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
        if new.meta["extra"].stays:
            new.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    graph.meta["dynamo_compile_id"] = gm.meta["dynamo_compile_id"]
    graph._param_name_to_source = {}  # type: ignore[assignment]
