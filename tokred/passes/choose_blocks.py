"""Mask blocks of an MLP's neurons that the method makes of its weights and chooses for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from tokred.compiler.blocks import Mlp
from tokred.compiler.capture import tensor_meta
from tokred.compiler.linears import Linear
from tokred.compiler.neurons import NeuronSite
from tokred.compiler.relaid import made_inputs, untracked
from tokred.passes.fewer_neurons import masked
from tokred.registry.neurons import Blockwise

__all__ = ["block_masked", "unsplit"]


@dataclass(frozen=True)
class Split:
    """What is made of an MLP's first weights: which block each neuron is of, and the blocks' centres.

    parts   for each weight whether it is [out in], and which of its outputs are neurons, from the first to behind the
            last
    """

    method: Blockwise
    parts: tuple[tuple[bool, int, int | None], ...]
    copies: ClassVar[bool] = False  # a neuron's block has no gradient to give

    def __call__(self, *weights: Tensor) -> tuple[Tensor, Tensor]:
        rows = []
        for weight, (as_rows, start, stop) in zip(weights, self.parts, strict=True):
            flat = weight.flatten(1)  # 1x1 convolutions [F C 1 1]
            rows.append((flat if as_rows else flat.T)[start:stop])
        return self.method.prepare(*rows)


def _first(site: NeuronSite) -> list[tuple[Linear, int, int | None]]:
    """The linears that make the neurons, the gate's first, and which of their outputs do."""
    mlp = site.block
    assert isinstance(mlp, Mlp)
    if mlp.gating is None:
        return [(linear, 0, None) for linear in mlp.inputs]
    found: list[tuple[Linear, int, int | None]] = []
    for part in (mlp.gating.gate, mlp.gating.up):
        sources = {part.linear, *part.linear.all_input_nodes}  # or the addition that joins a LoRA branch to it
        found += [(linear, part.start, part.stop) for linear in mlp.inputs if linear.node in sources]
    return found


def unsplit(site: NeuronSite, parameters: Mapping[str, Tensor]) -> str:
    """Why an MLP's neurons cannot be split into blocks, as half a sentence; "" if they can."""
    first = _first(site)
    if not first or len(first) > 2:
        return "what makes its neurons is no linear"
    for linear, start, stop in first:
        weight = tensor_meta(linear.weight)
        if linear.weight is None or linear.weight.op != "placeholder" or weight is None:
            return "the weight of one of its linears is computed, and no input of the graph"
        if len(range(weight.shape[0 if linear.rows else 1])[start:stop]) != site.place.size:
            return "its first linear has other outputs beside its neurons"
        if reason := untracked(parameters[linear.weight.name], copied=False):
            return reason
    return ""


def block_masked(graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], site: NeuronSite, method: Blockwise) -> fx.Node:
    """Let what reads the site's values read them with zeros for blocks that the method leaves out; that is returned."""
    first = _first(site)
    linear = first[0][0]
    weights = tuple(copies[part.weight] for part, _, _ in first if part.weight is not None)
    plain = replace(method, layers=None, phase="decode")
    split = Split(plain, tuple((part.rows, start, stop) for part, start, stop in first))
    fake = weights[0].meta["val"]
    channels = fake.shape[1 if linear.rows else 0]
    with fake.fake_mode:
        labels = torch.empty(site.place.size, dtype=torch.int64, device=fake.device)
        centres = torch.empty(method.blocks(site.place.size), channels, dtype=fake.dtype, device=fake.device)
    made = made_inputs(graph, weights, split, [labels, centres], f"{weights[0].name}_blocks")

    def function(own: Tensor, x: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
        x = x.movedim(linear.channel, -1).reshape(*own.shape[:-1], centres.shape[1])
        return method.blocks_masked(own, x, labels, centres)

    return masked(graph, copies, site, function, copies[linear.input], *made)
