"""Compute an MLP with fewer neurons, or with some of them masked.

Rows of its first weights and columns of its last are inputs of the graph; everything in between follows. That is looked
at on the axes of the graph: neurons must be the last dimension everywhere, and nothing else may read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import linear as dense_linear

from tokred.compiler.axes import Axes
from tokred.compiler.blocks import Mlp
from tokred.compiler.capture import tensor_meta
from tokred.compiler.fake import run_fake
from tokred.compiler.linears import Linear, linear_of
from tokred.compiler.neurons import NeuronSite
from tokred.compiler.record import record
from tokred.compiler.relaid import untracked
from tokred.compiler.requests import Choice
from tokred.errors import in_a_line
from tokred.passes.graph_edit import inherit
from tokred.passes.indices import same_shape

__all__ = ["Fewer", "fewer_neurons", "masked", "shorter"]

aten = torch.ops.aten

SIZED = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.expand.default}


@dataclass
class Fewer:
    """How an MLP is computed with fewer neurons.

    heads    values that become shorter: a linear's output, or a part of it that starts at an output channel
    between  what is computed of them, in order; the last linears read the last of these
    tails    linears that read the neurons
    """

    site: NeuronSite
    count: int
    heads: dict[fx.Node, tuple[Linear, int]]
    between: list[fx.Node]
    tails: list[Linear]

    def weights(self, key: Any, numbers: Mapping[fx.Node, int]) -> list[tuple[fx.Node, Choice]]:
        """The parameters of which a part is gathered, in the order in which `compute` takes them."""
        wanted: list[tuple[fx.Node, Choice]] = []
        for linear, start in self.heads.values():
            for parameter, dim in ((linear.weight, 0 if linear.rows else 1), (linear.bias, 0)):
                if parameter is not None:
                    wanted.append((parameter, Choice(key, self.count, numbers[parameter], dim, start)))
        for linear in self.tails:
            assert linear.weight is not None
            wanted.append((linear.weight, Choice(key, self.count, numbers[linear.weight], 1 if linear.rows else 0)))
        return wanted

    @property
    def outside(self) -> list[fx.Node]:
        """What the computation reads beside weights."""
        inner = {*self.heads, *self.between}
        read = [linear.input for linear, _ in self.heads.values()]
        read += [source for node in self.between for source in node.all_input_nodes if source not in inner]
        read += [linear.bias for linear in self.tails if linear.bias is not None]
        return list(dict.fromkeys(read))

    def compute(self, outside: list[Any], weights: list[Any], step: Callable[..., Any]) -> list[Any]:
        """What the tails give. `step(node, function, *args)` computes what takes the place of a node."""
        env: dict[fx.Node, Any] = dict(zip(self.outside, outside, strict=True))
        remaining = iter(weights)
        for node, (linear, _) in self.heads.items():
            weight, bias = next(remaining), None if linear.bias is None else next(remaining)
            env[node] = step(linear.node, _product, env[linear.input], weight, bias, linear.rows)
        for node in self.between:
            target: Any = node.target
            arguments: Any = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            args, kwargs = arguments
            if target in SIZED:
                args = (args[0], [*args[1][:-1], self.count], *args[2:])
            env[node] = step(node, partial(target, **kwargs), *args)
        results = []
        for linear in self.tails:
            weight, bias = next(remaining), None if linear.bias is None else env[linear.bias]
            results.append(step(linear.node, _product, env[linear.input], weight, bias, linear.rows))
        return results

    def write(self, graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], inputs: list[fx.Node]) -> list[fx.Node]:
        """Compute it in a copy of the graph, with these inputs as weights, in place of what stands there."""
        olds = [copies[linear.node] for linear in self.tails]
        first = min(olds)

        def step(origin: fx.Node, function: Callable[..., Any], *args: Any) -> Any:
            last = first.prev
            with graph.inserting_before(first):
                new = record(graph, function, args)
            while last.next is not first:
                last = last.next
                inherit([last], copies[origin])
            return new

        news: list[fx.Node] = self.compute([copies[node] for node in self.outside], inputs, step)
        for old, new in zip(olds, news, strict=True):
            new.meta["val"] = _as_before(new.meta["val"], old.meta["val"])
            old.replace_all_uses_with(new)
        return news


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, rows: bool) -> Tensor:
    return dense_linear(x, weight if rows else weight.t(), bias)


def _as_before(now: Tensor, was: Tensor) -> Tensor:
    if now.shape != was.shape or now.dtype != was.dtype:
        raise ValueError(f"fewer neurons give {list(now.shape)} {now.dtype} for {list(was.shape)} {was.dtype}")
    return now


def fewer_neurons(site: NeuronSite, count: int, axes: Axes, parameters: Mapping[str, Tensor]) -> Fewer | str:
    """How the MLP around a site is computed with `count` of its neurons; or why it cannot be, as half a sentence."""
    mlp, values = site.block, site.values
    assert isinstance(mlp, Mlp)
    if site.channel != -1:
        return "convolutions stand before and behind its neurons"
    parts = {part.node: part for part in (mlp.gating.gate, mlp.gating.up)} if mlp.gating is not None else {}
    heads: dict[fx.Node, tuple[Linear, int]] = {}
    between: set[fx.Node] = set()
    queue = [values]
    while queue:
        node = queue.pop()
        if node in heads or node in between:
            continue
        part = parts.get(node)
        linear = linear_of(part.linear if part is not None and part.node is not part.linear else node)
        if linear is not None:
            heads[node] = (linear, 0 if part is None else part.start)
            continue
        if node.op != "call_function" or (part is not None and part.node is not part.linear):
            return f"{node.name} stands before its neurons"
        between.add(node)
        queue += [source for source in node.all_input_nodes if _has(source, values, axes)]
    tails = [linear for user in values.users if (linear := linear_of(user)) is not None and linear.input is values]
    fewer = Fewer(site, count, heads, sorted(between), sorted(tails, key=lambda linear: linear.node))
    return _obstacle(fewer, axes, parameters) or fewer


def _has(node: fx.Node, values: fx.Node, axes: Axes) -> bool:
    """Whether one of a value's dimensions has neurons in it, or may have."""
    if isinstance(node.meta.get("val"), (int, torch.SymInt)):
        return False
    neurons = set(axes.of(values)[-1])
    return not axes.knows(node) or any(neurons & set(dim) for dim in axes.of(node))


def _obstacle(fewer: Fewer, axes: Axes, parameters: Mapping[str, Tensor]) -> str:
    """Why that would be something else, as half a sentence; "" if it is the same with fewer neurons."""
    inner = {*fewer.heads, *fewer.between}
    ends = {linear.node for linear in fewer.tails}
    values = fewer.site.values
    for node in inner:
        if axes.of(node)[-1] != axes.of(values)[-1]:
            return f"in {node.name} neurons are not the last dimension"
        if any(user not in inner and not (node is values and user in ends) for user in node.users):
            return f"{node.name} is read elsewhere too"
    for linear in (*(linear for linear, _ in fewer.heads.values()), *fewer.tails):
        weight = linear.weight
        gathered = [weight] if linear.bias is None or linear in fewer.tails else [weight, linear.bias]
        for parameter in gathered:
            if parameter is None or parameter.op != "placeholder" or parameter.name not in parameters:
                return "a weight is no input of the graph"
            if reason := untracked(parameters[parameter.name]):
                return reason
    try:
        _try(fewer)
    except Exception as error:
        return f"with fewer neurons: {in_a_line(error)}"
    return ""


def _try(fewer: Fewer) -> None:
    """Compute it on fake tensors. Raises where a shape is not what it was, but for the neurons."""
    weights = []
    for parameter, choice in fewer.weights(("", "", 0), _Any()):
        fake: Any = tensor_meta(parameter)
        weights.append(shorter(fake, choice))
    outside = [node.meta["val"] for node in fewer.outside]
    results = fewer.compute(outside, weights, lambda _, function, *args: run_fake(function, args, {}))
    for new, linear in zip(results, fewer.tails, strict=True):
        _as_before(new, linear.node.meta["val"])


class _Any(dict[fx.Node, int]):
    def __missing__(self, key: fx.Node) -> int:
        return 0


def shorter(parameter: Tensor, choice: Choice) -> Tensor:
    """What is gathered of a parameter, as a fake tensor."""
    shape = list(parameter.shape)
    shape[choice.dim] = choice.count
    mode: Any = parameter
    with mode.fake_mode, torch.no_grad():
        return torch.empty(shape, dtype=parameter.dtype, device=parameter.device)


def masked(
    graph: fx.Graph,
    copies: Mapping[fx.Node, fx.Node],
    site: NeuronSite,
    function: Callable[..., Tensor],
    *more: Any,
    readers: Iterable[fx.Node] | None = None,
) -> fx.Node:
    """Let what reads a site's values (or `readers`) read what `function` makes of them and `more`; that is returned.

    The function sees neurons as the last dimension. Raises ValueError where what it makes is no tensor like the values.
    """
    values, before = copies[site.values], set(graph.nodes)
    readers = [copies[node] for node in (site.readers if readers is None else readers)]
    meta = tensor_meta(values)
    assert meta is not None

    def moved(x: Tensor, *more: Any) -> Tensor:
        if site.channel == -1:
            return function(x, *more)
        return function(x.movedim(site.channel, -1), *more).movedim(-1, site.channel)

    with graph.inserting_before(min(readers)):
        new: fx.Node = record(graph, moved, (values, *more))
    now = tensor_meta(new)
    if now is None or not same_shape(now.shape, meta.shape) or now.dtype != meta.dtype:
        shown = "no tensor" if now is None else f"{list(now.shape)} {now.dtype}"
        raise ValueError(f"masked() gives {shown} for {list(meta.shape)} {meta.dtype}")
    inherit([node for node in graph.nodes if node not in before], values)
    for reader in readers:
        reader.replace_input_with(values, new)
    return new
