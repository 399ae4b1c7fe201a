"""Spans in the graph that is being lifted: masks [B N], found once at full length and then brought along."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from tokred.compiler.blocks import Attention
from tokred.compiler.residual import residual_of
from tokred.compiler.spans import Span, Spans
from tokred.compiler.staging import Rows, Stage
from tokred.registry.method import Reduction
from tokred.registry.spans import FOUND, derived

if TYPE_CHECKING:
    from tokred.passes.site_tensors import SiteTensors

__all__ = ["Labels"]


class Labels:
    """What methods are told of the tokens at a site beside their features."""

    def __init__(self, tensors: SiteTensors, spans: Spans):
        self.tensors, self.lift, self.spans = tensors, tensors.lift, spans
        self.checked: dict[tuple[fx.Node, bool], fx.Node] = {}  # a span's mask -> itself behind its run-time checks
        self.roots: dict[tuple[Any, ...], fx.Node | None] = {}

    def of(self, block: Attention, method: Reduction, stage: Stage) -> dict[str, fx.Node]:
        """[B N] for each span beside the visual one that a method needs, at a stage of a block's axis."""
        return {name: self.at(stage, ("span", name), self._root(block, name)) for name in self._asked(block, method)}

    def found(self, block: Attention, method: Reduction) -> list[str]:
        """What they were found from, for the report."""
        lines = []
        for name in self._asked(block, method):
            span, each = self.spans.of(block, name), self._per_image(block) if name == "images" else None
            found = FOUND[name] if each is None else f"the encoder's {each} features of each"
            if name == "padding" and self._valid(block) is None:
                found = "no mask, so there are none"
            lines.append(f"{name} rows from {found if span is None else span.found}")
        return lines

    def _asked(self, block: Attention, method: Reduction) -> list[str]:
        needs = method.needs_at(block.layer, block.depth)
        return [name for name in FOUND if name in needs]

    def padding(self, block: Attention, stage: Stage) -> fx.Node | None:
        """[B N] False for padding, at a stage of a block's axis, as its first attention shows it; None for none."""
        valid = self._valid(block)
        return None if valid is None else self.at(stage, "valid", valid)

    def at(self, stage: Stage, name: Any, node: Any) -> fx.Node:
        """What is known of each token of an axis, [B N], for those that are left at a stage of it."""
        for later in stage.chain[1:]:
            if name not in later.cache:
                later.cache[name] = self.lift.emit(lambda x, m: m.pick(x.unsqueeze(-1)).squeeze(-1), node, later.map)
            node = later.cache[name]
        found: fx.Node = node
        return found

    def inside(self, span: Span, rows: Rows | None, *, whole: bool) -> fx.Node:
        """[B N] the mask of a span, brought to the present stage of its axis. `whole`: it must be one piece."""
        mask: fx.Node = self.lift.env[span.mask].node  # type: ignore[index]
        count: Any = span.count
        message = "tokred: the samples of this batch have different numbers of image tokens"
        message = f"{message}, or others than the {count} that the graph was made for"
        torn = (
            "tokred: text stands between the image tokens of a sample, and merged ones would show it what comes later"
        )

        def checked(mask: torch.Tensor) -> torch.Tensor:
            torch.ops.aten._assert_async.msg((mask.sum(-1) == count).all(), message)
            if whole:
                starts = (mask[:, 1:] & ~mask[:, :-1]).sum(-1) + mask[:, 0]
                torch.ops.aten._assert_async.msg((starts <= 1).all(), torn)
            return mask.clone()

        if (mask, whole) not in self.checked:
            self.checked[mask, whole] = self.lift.emit(checked, mask)
        mask = self.checked[mask, whole]
        return mask if rows is None else self.at(rows.stage, ("inside", whole), mask)

    # -- at full length -----------------------------------------------------------------------------------------------

    def _first(self, block: Attention) -> Attention:
        return self.tensors.layers[block.axis, block.form, 0]

    def _valid(self, block: Attention) -> fx.Node | None:
        key = (block.axis, block.form, "valid")
        if key not in self.roots:
            self.roots[key] = self.tensors.visibility(self._first(block), {}).get("valid")
        return self.roots[key]

    def _per_image(self, block: Attention) -> int | None:
        """How many visual tokens the vision encoder made of each image, where that shows."""
        span = self.spans.of(block, "visual")
        images = None if span is None else self.tensors.images(span)
        return None if span is None or images is None else span.count // images  # type: ignore[operator]

    def _root(self, block: Attention, name: str) -> fx.Node:
        key = (block.axis, block.form, name)
        if key not in self.roots:
            first = self._first(block)
            value = self.lift.env[residual_of(first.join)]  # type: ignore[arg-type, index]
            while value.before_cut is not None:
                value = value.before_cut
            spans = {each: self.spans.of(block, each) for each in ("visual", "text", name)}
            ends = {each: (span.head, span.tail) for each, span in spans.items() if span is not None}
            masks = {each: self._mask(span) for each, span in spans.items() if span is not None and span.mask}
            per_image = self._per_image(block) if name == "images" else None

            def function(like: Tensor, valid: Tensor | None, masks: dict[str, Tensor]) -> Tensor:
                batch, tokens = like.shape[first.batch_dim], like.shape[first.token_dim]
                row = torch.arange(tokens, device=like.device).expand(batch, -1)
                given = {each: masks.get(each, (row >= a) & (row < tokens - b)) for each, (a, b) in ends.items()}
                visual = given.pop("visual") if "visual" in given else torch.zeros_like(row, dtype=torch.bool)
                for each, mask in given.items():
                    message = f"tokred: option spans: visual and {each} rows overlap"
                    torch.ops.aten._assert_async.msg((~(visual & mask)).all(), message)
                return derived(name, visual, valid, given, per_image)

            self.roots[key] = self.lift.emit(function, value.node, self._valid(block), masks)
        node = self.roots[key]
        assert node is not None
        return node

    def _mask(self, span: Span) -> fx.Node:
        assert span.mask is not None
        if span.mask not in self.lift.env:
            self.tensors.run_ahead(span.mask)
        node: fx.Node = self.lift.env[span.mask].node
        return node
