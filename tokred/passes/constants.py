"""What a node is known to hold at compile time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import is_fake, unset_fake_temporarily

from tokred.compiler.capture import is_parameter, tensor_meta
from tokred.compiler.relations import Op, same
from tokred.passes.indices import PERMUTES, SAME, VIEWS

__all__ = ["CASTS", "constant", "constant_tensor", "magnitude"]

aten = torch.ops.aten

CASTS = {aten._to_copy.default, aten.to.dtype, aten.type_as.default}
RESHAPING = (
    VIEWS | PERMUTES | SAME | CASTS | {aten.expand.default, aten.detach.default, aten.slice.Tensor, aten.select.int}
)
FILLED = {aten.full.default: "fill_value", aten.full_like.default: "fill_value", aten.scalar_tensor.default: "s"}
ZEROS = {aten.zeros.default, aten.zeros_like.default}
ONES = {aten.ones.default, aten.ones_like.default}
LARGEST = 1 << 22  # elements: a 2048 x 2048 mask takes milliseconds to compute


def constant(value: Any) -> float | None:
    """The number that `value` is, or that each of its elements is; None where that is not known."""
    if isinstance(value, (bool, int, float)):
        return float(value)
    meta = tensor_meta(value)
    if not isinstance(value, fx.Node) or meta is None or meta.is_complex():
        return None
    if value.target in RESHAPING:
        number = constant(value.args[0])
    elif value.target in FILLED:
        number = constant(Op(value)[FILLED[value.target]])
    elif value.target in ZEROS | ONES:
        number = 0.0 if value.target in ZEROS else 1.0
    else:
        tensor = constant_tensor(value) if same(meta.numel(), 1) else None
        number = float(tensor.item()) if tensor is not None else None
    return None if number is None else _rounded(number, meta.dtype)


def _rounded(number: float, dtype: torch.dtype) -> float:
    """What is left of a number in a tensor: the lowest float64 is -inf in float32."""
    with unset_fake_temporarily():
        return float(torch.tensor(number, dtype=torch.float64).to(dtype).item())


def constant_tensor(node: fx.Node) -> torch.Tensor | None:
    """The tensor that `node` always holds, on the CPU, if it follows from nothing but literals."""
    with unset_fake_temporarily(), torch.no_grad():
        try:
            return _evaluate(node, {})
        except _Unknown:
            return None


class _Unknown(Exception):
    """The node depends on something that is only known at run time, or is too big to compute here."""


def _evaluate(node: fx.Node, done: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    if node in done:
        return done[node]
    meta = tensor_meta(node)
    if node.op == "get_attr":
        done[node] = _literal(node)
        return done[node]
    target = node.target
    known = node.op == "call_function" and isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
    if not known or meta is None or not all(isinstance(size, int) for size in meta.shape) or meta.numel() > LARGEST:
        raise _Unknown
    assert isinstance(target, torch._ops.OpOverload)
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        raise _Unknown

    def run(value: Any) -> Any:
        return _evaluate(value, done) if isinstance(value, fx.Node) else value

    args = fx.node.map_aggregate(node.args, run)
    kwargs = {name: fx.node.map_aggregate(value, run) for name, value in node.kwargs.items()}
    kwargs |= {name: torch.device("cpu") for name in ("device",) if kwargs.get(name) is not None}
    kwargs.pop("pin_memory", None)
    result = target(*args, **kwargs)
    if not isinstance(result, torch.Tensor):
        raise _Unknown
    done[node] = result
    return result


def _literal(node: fx.Node) -> torch.Tensor:
    """A tensor that Dynamo made from a Python literal; a module's own state may change and is no constant."""
    owner = node.graph.owning_module
    value = getattr(owner, str(node.target), None)
    if "_tensor_constant" not in str(node.target) or not isinstance(value, torch.Tensor):
        raise _Unknown
    if isinstance(value, torch.nn.Parameter) or is_fake(value) or value.numel() > LARGEST:
        raise _Unknown
    return value.detach().cpu()


def magnitude(value: Any, depth: int = 0) -> float:
    """How large a constant may be in what makes up an additive mask, as far as the graph shows; else infinite.

    0 for parameters, buffers and what layers compute: activations, which hide no key. `(1 - m) * -1e9` has 1e9.
    """
    number = constant(value)
    if number is not None:
        return abs(number)
    if not isinstance(value, fx.Node):
        return 0.0
    meta = tensor_meta(value)
    if is_parameter(value) or value.target in COMPUTED or (meta is not None and not meta.is_floating_point()):
        return 0.0
    if value.target is aten.div.Tensor and (divisor := constant(value.args[1])):
        return magnitude(value.args[0], depth + 1) / abs(divisor)
    if value.op != "call_function" or value.target not in CARRIES | RESHAPING or depth > 30:
        return math.inf
    operands: list[Any] = []
    fx.node.map_aggregate((value.args, dict(value.kwargs)), operands.append)
    return max((magnitude(operand, depth + 1) for operand in operands), default=0.0)


# What is large only if an operand is.
CARRIES = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.rsub.Scalar,
    aten.neg.default,
    aten.where.self,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.cat.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.constant_pad_nd.default,
}
# Finite, or the network is broken before it reaches its attention.
COMPUTED = {
    aten.linear.default,
    aten.conv2d.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
    aten.addmm.default,
    aten.embedding.default,
    aten.sigmoid.default,
    aten.tanh.default,
}
