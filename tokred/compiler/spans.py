"""Spans: labelled rows of a token axis, from the user or from the graph.

transformers writes image features into the embeddings by `masked_scatter`: its mask says where, and the number of
features how many, so that half of the image's tokens is a static number although their places are data. What the user
gives becomes rows between two ends, or a mask that is a node of the captured graph like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from tokred.compiler.attention import Attention
from tokred.compiler.capture import is_parameter, tensor_meta
from tokred.compiler.causal import is_causal
from tokred.compiler.graphs import reaches
from tokred.compiler.record import record
from tokred.compiler.residual import residual_of
from tokred.errors import OptionError, nearest

__all__ = ["Span", "Spans", "scattered_span"]

aten = torch.ops.aten

STRETCHES = {aten.expand.default, aten.unsqueeze.default, aten.clone.default, aten._to_copy.default, aten.alias.default}
CACHED = ("decode", "static-cache")


@dataclass(frozen=True)
class Span:
    """All rows of every sample but the first `head` and the last `tail`, or those where `mask` [B N] is true.

    `mask` is a node of the captured graph.

    found     what that was found from
    count     how many rows of each sample the mask has; None where samples differ, or where nobody asked
    features  what was written there, row by row, where that shows
    """

    found: str
    head: Any = 0
    tail: Any = 0
    mask: fx.Node | None = None
    count: int | None = None
    features: fx.Node | None = None


class Spans:
    """The spans of the token axes of one captured graph.

    given   the option `spans`, checked
    inputs  the graph's inputs in this call, for masks that are computed from them: how many visual tokens there are has
            to be known when the graph is made, and is asserted whenever it runs
    """

    def __init__(self, gm: fx.GraphModule, given: dict[str, Any], inputs: list[Any]):
        self.gm, self.given = gm, given
        self.inputs = dict(
            zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=False)
        )  # what a pass added comes last
        self._known: dict[tuple[Any, ...], Span | None] = {}
        self._made: list[fx.Node] = []

    def of(self, block: Attention, name: str) -> Span | None:
        """The rows of the stream that enters an attention that `name` labels; None where nothing says so.

        What the user gave is about the prompt of a causal model, and not about steps that only extend its cache.
        Raises OptionError for a given span that cannot be one of this sequence.
        """
        if name not in self.given:
            return scattered_span(block) if name == "visual" else None
        extends = block.refusal is not None and block.refusal.code in CACHED
        if block.join is None or extends or not is_causal(block):
            return None
        key = (name, block.axis)
        if key not in self._known:
            self._known[key] = self._given(block, name)
            self._check_overlap(block)
        return self._known[key]

    @staticmethod
    def why_none(block: Attention) -> str:
        """Why there are no visual rows."""
        if _written(block) is None:
            return "no masked_scatter writes image features into this stream, and options name no rows"
        return "how many image features are written into each sample shows only when it runs, and options name no rows"

    def forget(self) -> None:
        """Leave the graph as it was: nobody reads the masks that were added."""
        for node in reversed(self._made):
            if not node.users:
                self.gm.graph.erase_node(node)

    # -- from the user ------------------------------------------------------------------------------------------------

    def _given(self, block: Attention, name: str) -> Span | None:
        given = self.given[name]
        if isinstance(given, tuple):
            return self._rows(block, name, given)
        if isinstance(given, Tensor):
            return self._constant(block, name, given)
        function, found = given, f"the callable {getattr(given, '__name__', type(given).__name__)}"
        if isinstance(given, int):
            function, found = (lambda inputs: inputs["input_ids"] == given), f"input_ids equal to {given}"
        return self._computed(block, name, function, found)

    def _rows(self, block: Attention, name: str, bounds: tuple[int | None, int | None]) -> Span:
        tokens, (start, stop) = block.tokens, bounds
        head = 0 if start is None else start if start >= 0 else tokens + start
        tail = 0 if stop is None else -stop if stop < 0 else tokens - stop
        if head < 0 or tail < 0 or head + tail >= tokens:  # guards, where the number of tokens is a symbol
            shown = ":".join("" if bound is None else str(bound) for bound in bounds)
            raise OptionError(f"option spans: {name} rows {shown} of a sequence of {tokens} tokens")
        return Span("options", head, tail)

    def _constant(self, block: Attention, name: str, mask: Tensor) -> Span:
        like, size = self._stream(block)
        _check_shape(f"option spans: {name}", mask, size)
        if not bool(mask.any(-1).all()):
            raise OptionError(f"option spans: {name} is a mask without any row")
        counts = mask.reshape(-1, mask.shape[-1]).sum(-1)
        count = int(counts[0]) if bool((counts == counts[0]).all()) else None
        buffer = f"tokred_span_{name}_{len(self._made)}"
        self.gm.register_buffer(buffer, mask.to(like.device), persistent=False)
        with self._in_front():
            node = self.gm.graph.get_attr(buffer)
            fakes: Any = detect_fake_mode([like])
            node.meta["val"] = fakes.from_tensor(self.gm.get_buffer(buffer))
            self._made.append(node)
            return Span("options, a mask", mask=self._emit(lambda x: x.expand(size), node), count=count)

    def _computed(self, block: Attention, name: str, function: Callable[[Any], Any], found: str) -> Span | None:
        """A mask from the model's inputs, computed in the graph. How many rows it has is what it has in this call."""
        size = self._stream(block)[1]
        nodes = {node.meta["input_name"]: node for node in self.inputs if _is_named(node)}
        where = f"option spans: {name}, {found}"

        def call(inputs: dict[str, Tensor], size: tuple[Any, Any] = size) -> Tensor:
            try:
                mask = function(_Inputs(inputs))
            except OptionError as error:
                raise OptionError(f"{where}: {error}") from None
            except Exception as error:
                raise OptionError(f"{where}, raised {type(error).__name__}: {error}") from error
            if not isinstance(mask, Tensor):
                raise OptionError(f"{where}, gave {type(mask).__name__} and no mask")
            _check_shape(where, mask, size)
            return mask

        count = None
        if name == "visual":
            now = call({key: self.inputs[node] for key, node in nodes.items()}, (_now(size[0]), _now(size[1])))
            counts = now.reshape(-1, now.shape[-1]).sum(-1).tolist()
            if not any(counts):
                return None
            count = counts[0] if len(set(counts)) == 1 else None
        with self._in_front():
            return Span(found, mask=self._emit(lambda inputs: call(inputs).expand(size), nodes), count=count)

    def _check_overlap(self, block: Attention) -> None:
        """Visual rows are no text: what the user says of both must not meet, as far as it is known without data."""
        given: list[Any] = [self.given.get(name) for name in ("visual", "text")]
        if not isinstance(block.tokens, int) or not all(isinstance(x, (tuple, Tensor)) for x in given):
            return
        row = torch.arange(block.tokens)
        masks = [x if isinstance(x, Tensor) else torch.isin(row, row[slice(x[0], x[1])]) for x in given]
        if bool((masks[0].cpu() & masks[1].cpu()).any()):
            raise OptionError("option spans: visual and text rows overlap")

    # -- the captured graph -------------------------------------------------------------------------------------------

    def _stream(self, block: Attention) -> tuple[Tensor, tuple[Any, Any]]:
        """The residual stream's fake tensor, and its samples and tokens."""
        like = tensor_meta(block.join)
        assert like is not None
        return like, (like.shape[block.batch_dim], like.shape[block.token_dim])

    def _in_front(self) -> Any:
        """What is added to the graph inside comes before anything is computed."""
        first = next(node for node in self.gm.graph.nodes if node.op not in ("placeholder", "get_attr"))
        return self.gm.graph.inserting_before(first)

    def _emit(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        before = set(self.gm.graph.nodes)
        node: fx.Node = record(self.gm.graph, function, args)
        self._made += [new for new in self.gm.graph.nodes if new not in before]
        return node


class _Inputs(dict[str, Tensor]):
    """The model's inputs by name; one that is not there is an error that names those that are."""

    def __missing__(self, name: str) -> Tensor:
        raise OptionError(f"the model has no input {name!r} here.{nearest(str(name), self)}")


def _is_named(node: fx.Node) -> bool:
    return "input_name" in node.meta and tensor_meta(node) is not None and not is_parameter(node)


def _check_shape(where: str, mask: Tensor, size: tuple[Any, Any]) -> None:
    if mask.dtype != torch.bool:
        raise OptionError(f"{where} is a mask of {mask.dtype}, not of torch.bool")
    shapes = ((size[1],), (1, size[1]), tuple(size))
    if all(len(shape) != mask.dim() or any(a != b for a, b in zip(shape, mask.shape, strict=True)) for shape in shapes):
        shown = f"{list(mask.shape)}, not [{size[1]}] or [{size[0]}, {size[1]}], samples and tokens"
        raise OptionError(f"{where} is a mask of shape {shown}")


def scattered_span(block: Attention) -> Span | None:
    """The image features that the graph writes into the stream that enters an attention; None where it shows none."""
    written = _written(block)
    return None if written is None else _scattered(written)


def _written(block: Attention) -> fx.Node | None:
    """The last masked_scatter in front of the block."""
    stream = residual_of(block.join) if block.join is not None else None
    if stream is None:
        return None
    writers: list[fx.Node] = list(stream.graph.find_nodes(op="call_function", target=aten.masked_scatter.default))
    for node in reversed(writers):
        if node is stream or (node < stream and reaches(node, stream)):
            return node
    return None


def _scattered(node: fx.Node) -> Span | None:
    """The mask of a masked_scatter over [B N C] as [B N], and how many rows of each sample it fills."""
    mask: Any = node.args[1]
    where, source = tensor_meta(node), tensor_meta(node.args[2])
    if where is None or source is None or where.dim() != 3:
        return None
    while (meta := tensor_meta(mask)) is not None and meta.dim() != 2 and mask.target in STRETCHES:
        mask = mask.args[0]
    batch, _, channels = where.shape
    if meta is None or meta.dim() != 2 or meta.dtype != torch.bool:
        return None
    features, sizes = source.numel(), [_now(size) for size in (source.numel(), channels, batch)]
    if None in sizes:
        return None
    count, rest = divmod(sizes[0], sizes[1] * sizes[2])
    if rest or not bool(features == count * channels * batch):  # where sizes are symbols, this becomes a guard
        return None
    features_node: Any = node.args[2]
    return Span("masked_scatter", mask=mask, count=count, features=features_node)


def _now(size: Any) -> Any:
    """The size that it has in this call; None where that is data."""
    return size if isinstance(size, int) else size.node.hint if size.node.has_hint() else None
