"""Products of two tensors, in every spelling, with the index that runs along each of their dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokred.compiler.capture import tensor_meta
from tokred.compiler.relations import Op, same
from tokred.passes.constants import constant
from tokred.passes.indices import Dim, Index, Layout

__all__ = ["Contraction", "Product", "contract", "product_of"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """`alpha * (left x right) + beta * bias` in einsum's notation: one letter a dimension."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    letters: tuple[str, str, str]  # of left, right and the result
    alpha: float = 1.0
    bias: fx.Node | None = None
    beta: float = 1.0


@dataclass(frozen=True)
class Contraction:
    """The same in indices: which dimension of what runs over what, and what is summed."""

    left: Layout
    right: Layout
    out: Layout
    summed: Dim


def product_of(node: fx.Node) -> Product | None:
    """None where `node` is no product of two tensors, or one that is more than a batch of matrix products."""
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        left, right = node.args[0], node.args[1]
        letters = _matrix_letters(left, right)
        return Product(node, left, right, letters) if letters is not None else None  # type: ignore[arg-type]
    if node.target is aten.baddbmm.default:
        op = Op(node)
        alpha, beta = constant(op["alpha"]), constant(op["beta"])
        if alpha is None or beta is None:
            return None
        bias = op["self"] if beta != 0 else None
        return Product(node, op["batch1"], op["batch2"], ("bij", "bjk", "bik"), alpha, bias, beta)
    if node.target is aten.einsum.default:
        operands: Any = node.args[1]
        letters = _einsum_letters(node.args[0], operands)
        return Product(node, operands[0], operands[1], letters) if letters is not None else None
    return None


def _matrix_letters(left: Any, right: Any) -> tuple[str, str, str] | None:
    a, b = tensor_meta(left), tensor_meta(right)
    if a is None or b is None or min(a.dim(), b.dim()) < 2 or max(a.dim(), b.dim()) > 12:
        return None
    batch = "abcdefghij"[: max(a.dim(), b.dim()) - 2]
    return batch[len(batch) - a.dim() + 2 :] + "nk", batch[len(batch) - b.dim() + 2 :] + "km", batch + "nm"


def _einsum_letters(equation: Any, operands: Any) -> tuple[str, str, str] | None:
    text = str(equation).replace(" ", "")
    if "." in text or "->" not in text or len(operands) != 2:
        return None
    inputs, out = text.split("->")
    left, right = inputs.split(",")
    if any(len(set(letters)) != len(letters) for letters in (left, right, out)):
        return None  # a diagonal
    return left, right, out


def contract(product: Product, left: Layout | None = None, right: Layout | None = None) -> Contraction | None:
    """Name the product's dimensions; the layout of one operand may be given.

    None where an index of one operand alone is summed, or the given layout does not fit.
    """
    spelled = (product.letters[0], product.letters[1])
    shapes = [tuple(tensor_meta(x).shape) for x in (product.left, product.right)]  # type: ignore[union-attr]
    names: dict[str, Dim] = {}
    for letters, shape, layout in zip(spelled, shapes, (left, right), strict=True):
        if layout is not None:
            names |= {
                letter: dim for letter, dim, size in zip(letters, layout, shape, strict=True) if not same(size, 1)
            }
    for letters, shape in zip(spelled, shapes, strict=True):
        for letter, size in zip(letters, shape, strict=True):
            if not same(size, 1):
                names.setdefault(letter, (Index(size),))
    summed = [letter for letter in dict.fromkeys("".join(spelled)) if letter not in product.letters[2]]
    if any(letter not in spelled[0] or letter not in spelled[1] for letter in summed):
        return None

    def layout_of(letters: str, shape: tuple[Any, ...]) -> Layout:
        return tuple(() if same(size, 1) else names[letter] for letter, size in zip(letters, shape, strict=True))

    whole = tuple(index for letter in summed for index in names.get(letter, ()))
    out_shape = tuple(tensor_meta(product.node).shape)  # type: ignore[union-attr]
    return Contraction(
        layout_of(spelled[0], shapes[0]),
        layout_of(spelled[1], shapes[1]),
        layout_of(product.letters[2], out_shape),
        whole,
    )
