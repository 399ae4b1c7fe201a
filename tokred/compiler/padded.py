"""The run-time half of packing a padded batch: count the padding, and call the graph that is made for that much."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx

__all__ = ["by_padding", "lower_padded"]

Compiled = Callable[..., Any]
Made = Callable[[], Compiled]


def lower_padded(
    dense: fx.GraphModule, inputs: list[Any], packing: Any, lower: Callable[[fx.GraphModule, list[Any]], Compiled]
) -> Compiled:
    """Lower both graphs of a Packing, and call the one or the other.

    Graphs of fixed sizes are lowered when they are first called for, most programs need one of them. One with run-time
    sizes may put guards on these while it is lowered, which Dynamo only listens to now: both are lowered at once.
    """
    fakes = [node.meta["val"] for node in packing.packed.graph.find_nodes(op="placeholder")]
    more = fakes[len(inputs) :]
    if any(isinstance(x, torch.SymInt) for x in fakes[: len(inputs)]):
        both = lower(packing.packed, [*inputs, *more]), lower(dense, inputs)
        return by_padding(packing.real.forward, lambda: both[0], lambda: both[1], packing.worth)
    mode = more[0].fake_mode  # the inputs themselves would be kept alive until both graphs are lowered
    own = [mode.from_tensor(x, static_shapes=True) if isinstance(x, torch.Tensor) else x for x in inputs]
    return by_padding(
        packing.real.forward,
        lambda: lower(packing.packed, [*own, *more]),
        lambda: lower(dense, own),
        packing.worth,
    )


def by_padding(real: Compiled, packed: Made, dense: Made, worth: float) -> Compiled:
    """Call the packed graph on the rows that are real, or the dense one where too few rows are padding.

    real     from the inputs to a boolean [B N]: which rows anyone reads
    packed   makes the graph that computes these rows alone: inputs, then rows [T] (numbers into B*N), their mask [B N]
             and for each place [B N] which of the rows is there (any, where none is)
    dense    makes the graph as it was; both are made when they are first called for
    worth    the share of padding above which packing pays
    """
    packed, dense = cache(packed), cache(dense)

    def call(*inputs: Any) -> Any:
        with torch.no_grad():
            (mask,) = real(*inputs)
            rows = mask.flatten().nonzero().squeeze(1)  # waits for the device: how many there are is needed here
            count, total = rows.shape[0], mask.numel()
            place = (mask.flatten().cumsum(0) - 1).clamp(min=0).view_as(mask)
        if count < 2 or count > (1 - worth) * total:
            return dense()(*inputs)
        return packed()(*inputs, rows, mask, place)

    return call
