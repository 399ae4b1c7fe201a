"""Spans: the rows of a token axis that hold image features, from the user's numbers or from the graph.

transformers writes image features into the embeddings by `masked_scatter`: its mask says where, and the number of
features how many, so that half of the image's tokens is a static number although their places are data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokred.compiler.attention import Attention
from tokred.compiler.capture import tensor_meta
from tokred.compiler.causal import is_causal
from tokred.compiler.graphs import reaches
from tokred.compiler.residual import residual_of
from tokred.errors import OptionError

__all__ = ["Span", "find_span", "why_no_span"]

aten = torch.ops.aten

STRETCHES = {aten.expand.default, aten.unsqueeze.default, aten.clone.default, aten._to_copy.default, aten.alias.default}


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of every sample, or the rows where `mask` [B N] is true, `count` in each sample.

    `features` are what was written there, row by row, where that shows.
    """

    found: str
    start: int = 0
    stop: int = 0
    mask: fx.Node | None = None
    count: int = 0
    features: fx.Node | None = None


def find_span(block: Attention, given: dict[str, Any]) -> Span | None:
    """The visual rows of the stream that enters an attention block; None where nothing shows.

    Raises OptionError for a given span that lies outside the sequence.
    """
    if "visual" in given:
        return _given(block, given["visual"]) if is_causal(block) else None
    written = _written(block)
    return None if written is None else _scattered(written)


def why_no_span(block: Attention) -> str:
    """Why `find_span` found nothing."""
    if _written(block) is None:
        return "no masked_scatter writes image features into this stream, and options name no rows"
    return "how many image features are written into each sample shows only when it runs, and options name no rows"


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


def _given(block: Attention, bounds: tuple[int, int]) -> Span | None:
    start, stop = bounds
    tokens = block.tokens
    if isinstance(tokens, int) and stop > tokens:
        raise OptionError(f"option spans: visual rows {start}:{stop} of a sequence of {tokens} tokens")
    return Span("options", start, stop)


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
