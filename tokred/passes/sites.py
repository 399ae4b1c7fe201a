"""Where a method may act: the numbers of a site, and why it would be refused."""

from __future__ import annotations

from typing import Any

from torch import fx

from tokred.compiler.blocks import Attention
from tokred.compiler.caches import Caches
from tokred.compiler.causal import is_causal
from tokred.compiler.report import Refusal
from tokred.compiler.residual import residual_of
from tokred.compiler.spans import Span
from tokred.compiler.staging import Stage
from tokred.compiler.suffix import Suffix, special_rows
from tokred.passes.site_tensors import PROBED, SiteTensors, rows_at, shape_of
from tokred.registry.method import Reduction
from tokred.registry.site import Place
from tokred.registry.spans import FROM_VISUAL

__all__ = ["node_to_cut", "place_of", "refuse", "unfit"]


def node_to_cut(block: Attention, scope: str) -> fx.Node | None:
    """The value whose tokens a method of this scope removes; None where the block has no such value."""
    if scope == "layer":
        return None if block.join is None else residual_of(block.join)
    return block.entry if scope == "round_trip" else block.stream


def place_of(
    block: Attention, node: fx.Node, value: Any, suffix: Suffix, span: Span | None, tensors: SiteTensors
) -> Place:
    """The numbers of a site: `value` is what `node` has become, `suffix` what follows from a cut there."""
    special = special_rows(node, block.token_dim, tensors.axes)
    head, tail, grid = special.head, special.tail, special.grid
    rows = rows_at(value, block.token_dim)
    length = value.shape[block.token_dim]
    head, tail = max(head, suffix.head), max(tail, suffix.tail)
    if rows is not None:  # rows that were concatenated to this axis later belong to no earlier stage: they stay
        head, tail = max(head, -rows.lo), max(tail, -rows.hi)
    if rows is not None and rows.stage.parent is not None:
        grid = None
    stage = rows.stage if rows is not None else Stage(length)
    gone = stage.root.length - stage.length  # from inside the span, which no earlier map may have left
    count = None
    if span is not None and span.mask is None:
        head, tail = max(head, span.head), max(tail, span.tail)
    elif span is not None and span.count is not None:
        count = span.count - gone
    whole = (length - head - tail if count is None else count) + gone
    if grid is not None and grid[0] * grid[1] != length - head - tail:
        grid = None
    if count is not None:
        grid, head, tail = None, 0, 0
    images = None if span is None else tensors.images(span)
    numbers = {"tokens": length, "head": head, "tail": tail, "span": count, "whole": whole, "grid": grid}
    return Place(layer=block.layer, depth=block.depth, images=images, **numbers)


def unfit(
    block: Attention,
    method: Reduction,
    place: Place,
    span: Span | None,
    tensors: SiteTensors,
    caches: Caches,
    *,
    companion: bool,
) -> Refusal | None:
    """What the method needs and the site lacks. `companion`: see Options."""
    needs = set(method.needs_at(block.layer, block.depth))
    attention = needs & PROBED
    if (named := sorted(needs & set(FROM_VISUAL) - set(tensors.spans.given))) and span is None:
        reason = f"the {' and '.join(named)} rows are told from visual ones, and there are none"
        return refuse("no-visual-span", reason, block)
    if "visual" in needs and span is not None and span.mask is not None and span.count is None:
        reason = f"visual rows from {span.found}: samples of this batch have different numbers of them"
        return refuse("ragged-images", reason, block)
    if "tower" in needs and (span is None or tensors.tower(span, method) is None):
        reason = "no vision encoder shows whose patches, one by one, became these image tokens"
        return refuse("no-vision-tower", reason, block)
    if "tower" in needs and place.free != place.whole:
        return refuse("no-vision-tower", "image tokens are gone, and others stand where the encoder's were", block)
    if "neurons" in needs and tensors.neurons(block) is None:
        return refuse("no-neurons", "no MLP of the layer before shows what its neurons do for each token", block)
    if method.scope == "layer" and method.probe == "previous" and attention and tensors.previous(block) is None:
        return refuse("no-previous-layer", "the scores come from the layer before, and there is none", block)
    if method.skips and tensors.blocks.end_of_layer(block) is None:
        return refuse("no-layer", "no MLP of its own ends this layer, so tokens cannot go around it", block)
    if "earlier" in needs and tensors.previous(tensors.probed(block, method)) is None:
        return refuse("no-previous-layer", "two layers before are compared, and there is one", block)
    later = [b for b in caches.cut if b.axis == block.axis and b.layer >= block.layer]
    if later:
        reason = f"layer {later[0].layer} returns only its last keys to its cache, and others would be the last"
        return refuse("sliding-cache", reason, block)
    if caches.whole and block.layer == 0 and method.scope == "layer" and not companion:
        reason = "the model reads positions off layer 0's cache, which would be short: use tokred.compile(model)"
        return refuse("first-cache", reason, block)
    if not method.causal_safe and method.merges != "visual" and is_causal(block):
        return refuse("causal", f"{method.name} mixes tokens, and later ones would leak into earlier ones", block)
    if attention and len(shape_of(block.key)) not in (3, 4):
        shown = f"the keys have {len(shape_of(block.key))} dimensions, not samples, heads, tokens, channels"
        return refuse("layout", shown, block)
    if "class_token" in needs and place.head < 1:
        reason = f"{method.name} ranks tokens by the class token's attention, and there is none"
        return refuse("no-class-token", reason, block)
    if "grid" in needs and place.grid is None:
        reason = f"{method.name} needs the patches' grid, which does not show (or no longer holds) here"
        return refuse("no-grid", reason, block)
    if isinstance(place.free, int) and place.free <= 0:
        return refuse("all-protected", f"all {place.tokens} tokens are protected", block)
    return None


def refuse(code: str, reason: str, block: Attention) -> Refusal:
    """A refusal at this block, in the user's own words for where it is."""
    return Refusal(code, reason, f"{block.module} ({block.source})" if block.module else block.source)
