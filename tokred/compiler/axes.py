"""Which dimensions of a graph index the same thing: union-find over dimensions, from the op rules alone.

Every dimension is a product of atoms. A view splits atoms into factors (both shapes' common refinement), an op that
works element by element makes dimensions equal, a slice is a new atom that remembers its parent. Sizes never count as
evidence: two axes of equal size are different axes unless an op says otherwise.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokred.compiler.axis_moves import refine
from tokred.compiler.relations import Join, Link, Op, Reshape, Slot, Window, flow_of, same

__all__ = ["Atom", "Axes", "Dim"]


@dataclass(eq=False)
class Atom:
    """One index. `parts` once it was found to be a product, `parent` once it was found to be another atom."""

    size: Any
    parent: Atom | None = None
    parts: tuple[Atom, ...] | None = None
    piece_of: tuple[tuple[Atom, ...], Any, Any] | None = None  # (whole, start, stop) of a slice
    label: int = field(default=-1)


Dim = tuple[Atom, ...]  # outermost factor first; () is a dimension of size one


class Axes:
    """The axis analysis of one graph. `of(node)` gives the dimensions of a tensor as tuples of leaf atoms."""

    def __init__(self, graph: fx.Graph):
        self._dims: dict[fx.Node, list[list[Dim]]] = {}
        self.opaque: list[fx.Node] = []
        self._pieces: dict[tuple[Any, ...], Atom] = {}
        for node in graph.nodes:
            self._visit(node)

    def of(self, node: fx.Node, result: int = 0) -> list[Dim]:
        """Each dimension of the tensor as leaf atoms, outermost first."""
        return [self.leaves(dim) for dim in self._dims[node][result]]

    def knows(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node in self._dims

    def leaves(self, dim: Dim) -> Dim:
        out: list[Atom] = []
        for atom in dim:
            root = _find(atom)
            out += self.leaves(root.parts) if root.parts is not None else [root]
        return tuple(out)

    def _visit(self, node: fx.Node) -> None:
        if node.target is operator.getitem and node.args[0] in self._dims:
            known = self._dims[node.args[0]]  # type: ignore[index]
            index = node.args[1]
            if isinstance(index, int) and index < len(known):
                self._dims[node] = [known[index]]
            return
        value = node.meta.get("val")
        results: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
        if node.op == "output" or not all(isinstance(r, torch.Tensor) for r in results):
            return
        dims: list[list[Dim]] = [[() if same(size, 1) else (Atom(size),) for size in r.shape] for r in results]
        self._dims[node] = dims
        if node.op != "call_function":
            return
        op = Op(node)
        flow = flow_of(op)
        if flow is None:
            if any(self.knows(operand) for operand in node.all_input_nodes):
                self.opaque.append(node)
            return
        for relation in flow:
            if isinstance(relation, Link):
                self._link(op, relation, dims)
            elif isinstance(relation, Reshape):
                self._reshape(self._slot_dims(op, relation.name), dims[0])
            elif isinstance(relation, Window):
                self._window(op, relation, dims)
            else:
                self._join(op, relation, dims)

    def _slot_dims(self, op: Op, name: str, index: int = 0) -> list[Dim]:
        value = op[name]
        node = value[index] if isinstance(value, (list, tuple)) else value
        return self._dims[node][0]

    def _slot(self, op: Op, slot: Slot) -> Dim:
        return self._slot_dims(op, slot.name, slot.item)[slot.dim]

    def _link(self, op: Op, link: Link, dims: list[list[Dim]]) -> None:
        slots = [self._slot(op, slot) for slot in link.ins]
        for result, dim in link.outs:
            if slots:
                dims[result][dim] = slots[0]
        for other in slots[1:]:
            self._unify(slots[0], other)

    def _unify(self, a: Dim, b: Dim) -> None:
        left, right = list(self.leaves(a)), list(self.leaves(b))
        while left and right:
            x, y = left.pop(0), right.pop(0)
            if x is y:
                continue
            if same(x.size, y.size):
                y.parent = x
            elif isinstance(x.size, int) and isinstance(y.size, int) and x.size % y.size == 0:
                rest = _split(x, y.size)
                y.parent = rest[0]
                left.insert(0, rest[1])
            elif isinstance(x.size, int) and isinstance(y.size, int) and y.size % x.size == 0:
                rest = _split(y, x.size)
                rest[0].parent = x
                right.insert(0, rest[1])
            else:
                return  # sizes that do not factor: no relation that this analysis can hold

    def _reshape(self, source: list[Dim], out: list[Dim]) -> None:
        atoms = [atom for dim in source for atom in self.leaves(dim)]
        shape = tuple(_product(dim) for dim in out)
        split = refine([atom.size for atom in atoms], shape, [isinstance(atom.size, int) for atom in atoms])
        if split is None:
            return
        rest = dict(enumerate(atoms))
        remaining = {i: atom.size for i, atom in rest.items()}
        for d, factors in enumerate(split):
            made: list[Atom] = []
            for i, size in factors:
                if same(size, remaining[i]):
                    made.append(rest[i])
                else:
                    first, second = _split(rest[i], size)
                    made.append(first)
                    rest[i], remaining[i] = second, second.size
            out[d] = tuple(made)

    def _window(self, op: Op, window: Window, dims: list[list[Dim]]) -> None:
        if window.out is None:
            return
        whole = self.leaves(self._slot(op, window.source))
        key = (tuple(id(atom) for atom in whole), str(window.start), str(window.stop))
        result, dim = window.out
        if not dims[result][dim]:
            return
        piece = self._pieces.setdefault(key, dims[result][dim][0])
        piece.piece_of = (whole, window.start, window.stop)
        dims[result][dim] = (piece,)

    def _join(self, op: Op, join: Join, dims: list[list[Dim]]) -> None:
        """Consecutive pieces that make up a whole are the whole again (split, rotate a part, concatenate)."""
        parts = [self.leaves(self._slot(op, slot)) for slot in join.parts]
        pieces = [part[0].piece_of if len(part) == 1 else None for part in parts]
        first = pieces[0]
        if first is None or any(p is None for p in pieces):
            return
        place: Any = 0
        for piece in pieces:
            assert piece is not None
            if self.leaves(piece[0]) != self.leaves(first[0]) or not same(piece[1], place):
                return
            place = piece[2]
        whole = self.leaves(first[0])
        if same(_product(whole), place):
            dims[join.out[0]][join.out[1]] = whole


def _find(atom: Atom) -> Atom:
    while atom.parent is not None:
        atom = atom.parent
    return atom


def _split(atom: Atom, outer: Any) -> tuple[Atom, Atom]:
    parts = (Atom(outer), Atom(atom.size // outer))
    atom.parts = parts
    return parts


def _product(dim: Dim) -> Any:
    size: Any = 1
    for atom in dim:
        size = size * atom.size
    return size
