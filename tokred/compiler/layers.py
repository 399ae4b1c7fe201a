"""Layers as wholes: an attention with the MLP behind it, and what of the graph their output depends on."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tokred.compiler.blocks import Attention, Mlp
from tokred.compiler.neurons import NeuronSite
from tokred.compiler.residual import residual_of

__all__ = ["Layer", "find_layers"]

ADDITION = torch.ops.aten.add.Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """Some sites, and the stream behind the last of their blocks.

    nodes   what lies between what the sites' linears read and the output, in the order of the graph
    needed  what these nodes read beside one another
    """

    sites: tuple[NeuronSite, ...]
    output: fx.Node
    nodes: tuple[fx.Node, ...]
    needed: frozenset[fx.Node]

    def run(self, known: Mapping[fx.Node, Any], masks: Mapping[NeuronSite, Callable[[Tensor], Tensor]]) -> Any:
        """The output, from the values of `needed`, if the linears of some sites read masked values."""
        values = dict(known)
        masked = {reader: (site.values, masks[site]) for site in self.sites if site in masks for reader in site.readers}
        for node in self.nodes:
            read: Mapping[fx.Node, Any] = values
            if node in masked:
                source, mask = masked[node]
                read = ChainMap({source: mask(values[source])}, values)
            function: Any = node.target
            args: Any = fx.map_arg(node.args, read.__getitem__)
            kwargs: Any = fx.map_arg(node.kwargs, read.__getitem__)
            values[node] = function(*args, **kwargs)
        return values[self.output]


def find_layers(sites: Iterable[NeuronSite]) -> list[Layer]:
    """The sites by layer. Another layer begins with an attention behind an MLP or another attention of the same form,
    and where the token axis changes; it ends where the last of its blocks is added to the stream."""
    by_block: dict[Attention | Mlp, list[NeuronSite]] = {}
    for site in sites:
        by_block.setdefault(site.block, []).append(site)
    groups: list[list[Attention | Mlp]] = []
    for block in sorted(by_block, key=_last):
        if not groups or any(_parted(before, block) for before in groups[-1]):
            groups.append([])
        groups[-1].append(block)
    return [_layer([site for block in group for site in by_block[block]], max(map(_output, group))) for group in groups]


def _parted(before: Attention | Mlp, block: Attention | Mlp) -> bool:
    """Whether two blocks cannot be of one layer."""
    if block.axis != before.axis or not isinstance(block, Attention):
        return block.axis != before.axis
    return isinstance(before, Mlp) or (block.form == before.form and block.layer != before.layer)


def _last(block: Attention | Mlp) -> fx.Node:
    return block.anchor if isinstance(block, Attention) else block.down


def _output(block: Attention | Mlp) -> fx.Node:
    """Where a block's result joins a stream that is older than it; else the first sum that it goes into; or itself."""
    start = _last(block)
    queue, seen = [start], set()
    first = None
    while queue:
        node = min(queue)
        queue.remove(node)
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        stream = residual_of(node)
        if stream is not None and stream < start:
            return node
        if first is None and node.target is ADDITION and len(node.all_input_nodes) == 2:
            first = node
        if stream is None:
            queue += node.users
    return start if first is None else first


def _layer(sites: list[NeuronSite], output: fx.Node) -> Layer:
    touched = {reader for site in sites for reader in site.readers}
    passed = []
    for node in output.graph.nodes:
        passed.append(node)
        if any(source in touched for source in node.all_input_nodes):
            touched.add(node)
        if node is output:
            break
    wanted = {output}
    for node in reversed(passed):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    nodes = tuple(node for node in passed if node in touched and node in wanted)
    inner = set(nodes)
    return Layer(tuple(sites), output, nodes, frozenset(n for node in nodes for n in node.all_input_nodes) - inner)
