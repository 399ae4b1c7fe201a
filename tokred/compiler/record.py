"""Run plain tensor code on fake tensors and write every ATen call that it makes into a graph.

A method has a few dozen ops in every layer of a model; recording what reaches the dispatcher costs a tenth of a full
re-trace. What is recorded is functional as far as the code is, and differentiable like any other ATen graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tokred.compiler.capture import STRIDED
from tokred.compiler.fake import run_fake

__all__ = ["record"]

aten = torch.ops.aten


def record(graph: fx.Graph, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call `function(*args)`, a pytree of nodes of `graph` among them, and append what it does to `graph`.

    Returns the function's result with nodes in place of tensors; each node carries fake metadata. A real tensor that
    the function brings along, such as a method's trained weights, becomes a buffer of the module that owns the graph.
    Raises ValueError for a tensor that is built from Python data.
    """
    flat, spec = _pytree.tree_flatten(args)
    recorder = _Recorder(graph)
    values = [recorder.value(item) if isinstance(item, fx.Node) else item for item in flat]
    recorder.fake_mode = detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)])
    with torch.no_grad(), enable_python_dispatcher(), recorder.fake_mode or nullcontext(), recorder:
        result = function(*_pytree.tree_unflatten(values, spec))
    return _pytree.tree_map(lambda out: recorder.node(out) if isinstance(out, torch.Tensor) else out, result)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: fx.Graph):
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph
        self.fake_mode: FakeTensorMode | None = None
        self.nodes: dict[int, fx.Node] = {}
        self.owned: dict[int, torch.Tensor] = {}  # real tensors, by id, as fake ones
        self.alive: list[Any] = []  # ids stay unique only while their tensors live
        self.sizes: dict[sympy.Expr, tuple[fx.Node, int]] = {}

    def value(self, node: fx.Node) -> Any:
        """The fake value of a node, known to the recorder from now on."""
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            value = value.view_as(value) if id(value) in self.nodes else value
            self._know(value, node)
        return value

    def node(self, value: torch.Tensor) -> fx.Node:
        if id(value) not in self.nodes:
            raise ValueError("a tensor made from Python data has no place in a graph; use torch.arange or torch.full")
        return self.nodes[id(value)]

    def _know(self, value: torch.Tensor, node: fx.Node) -> None:
        self.nodes[id(value)] = node
        self.alive.append(value)
        sizes: list[Any] = list(value.shape)
        for dim, size in enumerate(sizes):
            if isinstance(size, torch.SymInt):
                self.sizes.setdefault(size.node.expr, (node, dim))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # what FakeTensor makes of `x.device`
            return args[0].fake_device
        if func is not aten.lift_fresh.default:
            args, kwargs = _pytree.tree_map_only(torch.Tensor, self._own, (args, kwargs))
        out = run_fake(func, args, kwargs)
        node_args, node_kwargs = _pytree.tree_map(self._argument, (args, kwargs))
        node = self.graph.call_function(aten.reshape.default if func in STRIDED else func, node_args, node_kwargs)
        node.meta["val"] = out
        if isinstance(out, torch.Tensor):
            self._know(out, node)
        elif isinstance(out, (list, tuple)):
            for i, part in enumerate(out):
                item = self.graph.call_function(operator.getitem, (node, i))
                item.meta["val"] = part
                if isinstance(part, torch.Tensor):
                    self._know(part, item)
        return out

    def _own(self, value: torch.Tensor) -> torch.Tensor:
        """A real tensor as a fake one that is known to be a buffer of the module; a fake one as it is."""
        module: Any = self.graph.owning_module
        if isinstance(value, FakeTensor) or self.fake_mode is None or module is None:
            return value
        if id(value) not in self.owned:
            name = next(name for n in count() if not hasattr(module, name := f"tokred_{n}"))
            with _disable_current_modes():
                module.register_buffer(name, value.detach())
                fake = self.owned[id(value)] = self.fake_mode.from_tensor(value.detach(), static_shapes=True)
            node = self.graph.create_node("get_attr", name)
            node.meta["val"] = fake
            self._know(fake, node)
            self.alive.append(value)
        return self.owned[id(value)]

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.node(value)
        if isinstance(value, torch.SymInt):
            return self._size(value.node.expr, value)
        return value

    def _size(self, expr: sympy.Expr, value: Any = None) -> Any:
        """A run-time size as a node: read from a tensor that has it, or computed from others."""
        if expr.is_Integer:
            return int(expr)
        if expr in self.sizes:
            tensor, dim = self.sizes[expr]
            node = self.graph.call_function(aten.sym_size.int, (tensor, dim))
            node.meta["val"] = tensor.meta["val"].shape[dim]
            return node
        operation = {sympy.Mul: operator.mul, sympy.Add: operator.add}.get(expr.func)
        if operation is None and expr.func.__name__ in ("FloorDiv", "CleanDiv"):
            operation = operator.floordiv
        if operation is None:
            return self._given(expr)
        parts = [self._size(part) for part in expr.args]
        total = parts[0]
        for part in parts[1:]:
            node = self.graph.call_function(operation, (total, part))
            node.meta["val"] = operation(_number(total), _number(part))
            total = node
        return total

    def _given(self, expr: sympy.Expr) -> Any:
        """A run-time size that no tensor of this code shows any more: an input of the graph is it, or has it."""
        for node in self.graph.find_nodes(op="placeholder"):
            value: Any = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr == expr:
                return node
            sizes: list[Any] = list(value.shape) if isinstance(value, torch.Tensor) else []
            for dim, size in enumerate(sizes):
                if isinstance(size, torch.SymInt) and size.node.expr == expr:
                    made = self.graph.call_function(aten.sym_size.int, (node, dim))
                    made.meta["val"] = size
                    return made
        raise ValueError(f"no tensor shows the run-time size {expr}")


def _number(part: Any) -> Any:
    return part.meta["val"] if isinstance(part, fx.Node) else part
