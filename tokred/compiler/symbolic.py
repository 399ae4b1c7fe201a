"""Costs as polynomials: a graph's sizes as sympy symbols, named by what the axis analysis says they index.

N is the token axis asked about, B the samples, C the stream's channels, H heads, D a head's channels, F hidden neurons.
Sizes without such a role stay numbers; those that Dynamo left symbolic stay Dynamo's expressions. Every symbol has a
value, the size at the time of tracing, so that an expression can be evaluated at another N.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from tokred.compiler.axes import Atom, Axes, Dim
from tokred.compiler.blocks import Attention, Blocks, Mlp
from tokred.compiler.capture import module_path, tensor_meta
from tokred.compiler.relations import same
from tokred.compiler.work import flops, hint, moved, weights

__all__ = ["Formula", "Symbols", "expression"]


@dataclass(frozen=True)
class Formula:
    """FLOPs by type of number, bytes of activations moved, bytes of parameters read: sympy expressions.

    `values` are the symbols' sizes in the traced graph.
    """

    flops: dict[torch.dtype, Any] = field(default_factory=dict)
    moved: Any = 0
    weights: Any = 0
    values: dict[Any, int] = field(default_factory=dict)

    def at(self, **sizes: int) -> Formula:
        """The same with numbers for symbols: `at(N=184)`; every other symbol gets its traced size."""
        values = {symbol: sizes.get(str(symbol), value) for symbol, value in self.values.items()}

        def number(expression: Any) -> float:
            return float(sympy.sympify(expression).xreplace(values))

        counted = {dtype: number(expression) for dtype, expression in self.flops.items()}
        return Formula(counted, number(self.moved), number(self.weights))

    def __str__(self) -> str:
        total = sympy.Add(*self.flops.values())
        return f"{_tidy(total)} FLOPs, {_tidy(self.moved)} + {_tidy(self.weights)} bytes"


def expression(gm: fx.GraphModule, axes: Axes, blocks: Blocks) -> dict[Attention | Mlp, Formula]:
    """For each block the work of its nodes: an attention's by module path, an MLP's between its linears."""
    found: dict[Attention | Mlp, Formula] = {}
    known: dict[tuple[int, ...], Symbols] = {}
    every: list[Attention | Mlp] = [*blocks.attentions, *blocks.mlps]
    for block in every:
        if block.axis not in known:
            known[block.axis] = Symbols(axes, blocks, block.axis)
        if isinstance(block, Mlp):
            nodes = _between(block)
        else:
            nodes = {n for n in gm.graph.nodes if (module_path(n) + ".").startswith(block.module + ".")}
        found[block] = known[block.axis].total(nodes)
    return found


def _between(mlp: Mlp) -> set[fx.Node]:
    """The first linears, the last one, and what lies on the way."""
    found, queue = {mlp.down, *mlp.ups}, list(mlp.down.all_input_nodes)
    while queue:
        node = queue.pop()
        if node not in found and node.op == "call_function":
            found.add(node)
            queue += node.all_input_nodes
    return found


class Symbols:
    """Names for the sizes of one graph, seen from one token axis (given as `Attention.axis` gives it)."""

    def __init__(self, axes: Axes, blocks: Blocks, axis: tuple[int, ...]):
        self.axes = axes
        self.values: dict[Any, int] = {}
        self._names: list[tuple[Dim, Any]] = []
        self._sizes: dict[fx.Node, list[Any]] = {}
        self._work: dict[fx.Node, tuple[Any, Any, Any]] = {}
        self.tokens: Any = sympy.Integer(1)
        for block in blocks.attentions:
            if block.axis == axis:
                self._name_attention(block)
        for mlp in blocks.mlps:
            if mlp.axis == axis:
                source = mlp.inputs[0].input if mlp.inputs else mlp.ups[0].all_input_nodes[0]
                self._name("C", axes.of(source)[-1])
                self._name("F", axes.of(mlp.down.all_input_nodes[0])[-1])

    def _name_attention(self, block: Attention) -> None:
        query = self.axes.of(block.query)
        self._name("N", self.axes.of(block.anchor)[-2])
        self.tokens = self._size(self.axes.of(block.anchor)[-2])
        if block.stream is not None:
            stream = self.axes.of(block.stream)
            self._name("B", stream[block.batch_dim])
            self._name("C", stream[-1])
        if block.entry is not None:  # what a norm gives are other channels, though as many
            self._name("C", self.axes.of(block.entry)[-1])
        self._name("D", query[-1])
        if len(query) == 4:
            self._name("H", query[1])

    def _name(self, letter: str, dim: Dim) -> None:
        """The first bearer of a letter keeps it; another axis in that role shares it, or is C1 if its size differs."""
        if not dim or any(atom in known for known, _ in self._names for atom in dim):
            return
        value = hint(_extent(dim))
        peers = {symbol for _, symbol in self._names if str(symbol)[0] == letter}
        twin = next((symbol for symbol in peers if self.values[symbol] == value), None)
        symbol = twin or sympy.Symbol(f"{letter}{len(peers) or ''}", integer=True, positive=True)
        self.values[symbol] = value
        self._names.append((dim, symbol))

    def sizes(self, node: fx.Node) -> list[Any]:
        """The dimensions of a tensor node as expressions."""
        if node not in self._sizes:
            if self.axes.knows(node):
                self._sizes[node] = [self._size(dim) for dim in self.axes.of(node)]
            else:
                meta = tensor_meta(node)
                self._sizes[node] = [] if meta is None else [self._number(size) for size in meta.shape]
        return self._sizes[node]

    def _size(self, dim: Dim) -> Any:
        total: Any = sympy.Integer(1)
        place = 0
        while place < len(dim):
            for atoms, symbol in self._names:
                if dim[place : place + len(atoms)] == atoms:
                    total, place = total * symbol, place + len(atoms)
                    break
            else:
                total, place = total * self._atom(dim[place]), place + 1
        return total

    def _atom(self, atom: Atom) -> Any:
        """A part of the token axis that lacks only rows at its ends is N minus those; other slices are constant."""
        if atom.piece_of is not None:
            whole, start, stop = atom.piece_of
            size = self._size(self.axes.leaves(whole))
            at_an_end = same(stop, _extent(whole)) or same(start, 0)
            missing = hint(_extent(whole)) - hint(atom.size)
            if size == self.tokens and at_an_end and 3 * missing < hint(_extent(whole)):
                return size - missing
        return self._number(atom.size)

    def _number(self, size: Any) -> Any:
        """A number, or Dynamo's expression for a size that is not known; its symbols get the values they had."""
        if not isinstance(size, torch.SymInt):
            return sympy.Integer(size)
        found = size.node.expr
        if found.is_Symbol:
            self.values[found] = hint(size)
            return found
        symbol = sympy.Symbol(f"({found})", integer=True, positive=True)
        self.values[symbol] = hint(size)
        return symbol

    def work(self, node: fx.Node) -> tuple[Any, Any, Any]:
        """FLOPs, bytes of activations, bytes of parameters of one node."""
        if node not in self._work:
            if node.op != "call_function":
                self._work[node] = (0, 0, 0)
            else:
                self._work[node] = flops(node, self.sizes), moved(node, self.sizes), weights(node, self.sizes)
        return self._work[node]

    def total(self, nodes: Iterable[fx.Node]) -> Formula:
        """The work of some nodes together. Layers are alike, so equal terms are counted before they are added."""
        products: Counter[tuple[torch.dtype, Any]] = Counter()
        acts: Counter[Any] = Counter()
        params: Counter[Any] = Counter()
        for node in nodes:
            work, activations, parameters = self.work(node)
            if work != 0:
                products[_dtype(node), work] += 1
            acts[activations] += 1
            params[parameters] += 1
        by_dtype: dict[torch.dtype, Any] = {}
        for (dtype, term), count in products.items():
            by_dtype[dtype] = by_dtype.get(dtype, 0) + count * term
        return Formula(by_dtype, _weighted(acts), _weighted(params), self.values)


def _extent(dim: Dim) -> Any:
    total: Any = 1
    for atom in dim:
        total = total * atom.size
    return total


def _weighted(terms: Counter[Any]) -> Any:
    return sympy.Add(*(count * term for term, count in terms.items()))


def _dtype(node: fx.Node) -> torch.dtype:
    meta = tensor_meta(node)
    return torch.float32 if meta is None else meta.dtype


def _tidy(expression: Any) -> str:
    return str(sympy.expand(expression))
