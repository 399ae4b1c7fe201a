"""Image features that a method makes of this call's and the last one's, with what it keeps as inputs and results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from tokred.compiler.blocks import Attention, Blocks
from tokred.compiler.capture import tensor_meta
from tokred.compiler.extras import extra_input
from tokred.compiler.graphs import nearest
from tokred.compiler.memory import Memory
from tokred.compiler.options import Options
from tokred.compiler.record import record
from tokred.compiler.relations import Op
from tokred.compiler.report import Refusal
from tokred.compiler.spans import Span, scattered_span
from tokred.compiler.towers import Tower, find_tower
from tokred.errors import in_a_line
from tokred.passes.graph_edit import copy_graph
from tokred.passes.site_tensors import RAGGED, number, visible
from tokred.passes.sites import refuse
from tokred.registry.frames import FrameFusion, Frames
from tokred.registry.method import Reduction
from tokred.registry.site import Site

__all__ = ["Fused", "fuse_frames"]

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding}  # the second has its padding in words


@dataclass
class Fused:
    """The graph, with more inputs and results where `memory` is not None; what was done and what was not."""

    graph: fx.GraphModule
    memory: Memory | None = None
    lines: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


@dataclass
class _Found:
    """Nodes of a graph: what reads the features, these, the pixels; the side of a patch; where relevance comes from."""

    span: Span
    features: fx.Node
    pixels: fx.Node
    patch: int
    patches: int
    probe: Attention | None


def fuse_frames(gm: fx.GraphModule, blocks: Blocks, options: Options) -> Fused:
    """Let the recipe's FrameFusion choose what the language model reads. Graphs without images stay as they are."""
    methods = options.recipe.of(FrameFusion)
    spans = [(block, span) for block in blocks.attentions if (span := scattered_span(block)) is not None]
    if methods and not spans and "visual" in options.spans:
        reason = f"{methods[0].name}: no vision encoder shows, but rows that the option spans names"
        return Fused(
            gm, refusals=[refuse("no-vision-tower", reason, blocks.attentions[0])] if blocks.attentions else []
        )
    if not methods or not spans:
        return Fused(gm)
    block, span = spans[0]
    if len(methods) > 1:
        return Fused(gm, refusals=[refuse("two-memories", f"{methods[0].name} and {methods[1].name} both keep", block)])
    method = methods[0]
    try:
        behind = [other for other, of in spans if of == span]
        return _rewrite(gm, method, _find(method, blocks, behind, span, options.recipe.of(Reduction)))
    except _Unfit as unfit:
        return Fused(gm, refusals=[refuse(unfit.code, f"{method.name}: {unfit}", block)])
    except Exception as error:
        reason = f"{method.name}: {in_a_line(error)}"
        return Fused(gm, refusals=[refuse("method-raised", reason, block)])


class _Unfit(Exception):
    def __init__(self, code: str, reason: str):
        super().__init__(reason)
        self.code = code


def _find(
    method: FrameFusion, blocks: Blocks, behind: list[Attention], span: Span, cuts: tuple[Reduction, ...]
) -> _Found:
    """Everything that the rewrite needs, or _Unfit. `behind`: the attentions that read the span; `cuts`: what else the
    recipe does to them."""
    tower = None if span.features is None else find_tower(span.features, blocks.attentions)
    if tower is None or span.features is None or span.mask is None:
        raise _Unfit("no-vision-tower", "no vision encoder shows whose patches, one by one, became the image tokens")
    pixels, patch, patches = _pixels(tower)
    layer = method.looks(max(block.depth for block in behind))
    if layer is None:
        return _Found(span, span.features, pixels, patch, patches, None)
    probe = next((block for block in behind if block.layer == layer and block.form == "self"), None)
    if probe is None or probe.anchor.target is not SDPA or probe.query.meta["val"].dim() != 4:
        raise _Unfit("no-attention", f"layer {layer} has no attention over the prompt that shows its queries and keys")
    if probe.refusal is not None:
        raise _Unfit(probe.refusal.code, f"of layer {layer}: {probe.refusal.reason}")
    for cut in cuts:
        last = {"layer": layer, "persistent": layer - 1}.get(cut.scope, -1)
        if any(b.layer <= last and cut.acts_on(b.layer, b.depth, b.module) for b in behind):
            reason = f"{cut.name} acts in front of layer {layer}, whose attention says nothing of tokens that are gone"
            raise _Unfit("cut-before", f"{reason}: say another layer")
    return _Found(span, span.features, pixels, patch, patches, probe)


def _pixels(tower: Tower) -> tuple[fx.Node, int, int]:
    """What the encoder's first convolution reads, [I 3 H W], the side of its patches, and how many there are."""
    convolutions = nearest(tower.stream, CONVOLUTIONS)
    patches = tower.stream.meta["val"].shape[1] - tower.first
    if len(convolutions) == 1:
        op = Op(convolutions.pop())
        images, kernel = tensor_meta(op["input"]), tensor_meta(op["weight"])
        assert images is not None and kernel is not None
        side, size = kernel.shape[-1], list(images.shape[1:])
        padding = op["padding"]
        whole = padding == "valid" if isinstance(padding, str) else not any(padding)
        whole = whole and list(kernel.shape[2:]) == list(op["stride"]) == [side, side]
        if whole and size[0] == 3 and all(isinstance(n, int) and n % side == 0 for n in size[1:]):
            if size[1] * size[2] == patches * side * side:
                found: fx.Node = op["input"]
                return found, side, patches
    raise _Unfit("no-patches", "no convolution shows that each image token is one square patch of an image")


def _rewrite(gm: fx.GraphModule, method: FrameFusion, found: _Found) -> Fused:
    images = found.pixels.meta["val"]
    copy = copy_graph(gm)
    node_of = dict(zip(gm.graph.nodes, copy.graph.nodes, strict=True))
    graph, features, patches = copy.graph, node_of[found.features], found.patches
    channels, mode = features.meta["val"].shape[-1], detect_fake_mode([images])
    wide = torch.float64 if features.meta["val"].dtype == torch.float64 else torch.float32
    kinds: dict[str, tuple[tuple[Any, ...], Any]] = {
        "step": ((), torch.int64),
        "pixels": (tuple(images.shape), images.dtype),
        "features": ((images.shape[0], patches, channels), features.meta["val"].dtype),
    }
    if found.probe is not None:
        kinds["relevance"] = ((images.shape[0], patches), wide)
    given = _place_of(gm, images.shape[0])
    sizes = {name: tuple(n if isinstance(n, int) else None for n in shape) for name, (shape, _) in kinds.items()}
    made = [(sizes[name], dtype, images.device) for name, (_, dtype) in kinds.items()]
    memory, before = Memory(method, made, given), {}
    for name, (shape, dtype) in kinds.items():
        assert mode is not None
        with mode:
            fake = torch.empty(shape, dtype=dtype, device=images.device)
        before[name] = extra_input(graph, f"tokred_before_{name}", memory, fake)

    def fuse(features: Tensor, pixels: Tensor, before: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        seen = Frames(before["pixels"], before["features"], before.get("relevance"), found.patch)
        fused = method.fuse(pixels, features.reshape(-1, patches, channels), seen, before["step"])
        return fused.reshape(features.shape), fused, before["step"] + 1

    readers = [user for user in features.users if user.target is aten.masked_scatter.default]
    with graph.inserting_before(min(readers)):
        flat, fused, step = record(graph, fuse, (features, node_of[found.pixels], before))
    for reader in readers:
        reader.replace_input_with(features, flat)
    carried = {"step": step, "pixels": node_of[found.pixels], "features": fused}
    output = graph.output_node()
    if found.probe is not None:
        with graph.inserting_before(output):
            carried["relevance"] = _relevance(graph, found, node_of)
    results: Any = output.args[0]
    output.args = ((*results, *(carried[name] for name in kinds)),)
    graph.lint()
    copy.recompile()
    line = f"{method}: {patches} tokens of each image are its own or the last call's; saves no compute"
    return Fused(copy, memory, [line])


def _place_of(gm: fx.GraphModule, size: Any) -> tuple[int, int] | None:
    """An input, by its number, and its dimension that is as long as a run-time size."""
    if isinstance(size, int):
        return None
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        for dim, other in enumerate(getattr(tensor_meta(node), "shape", ())):
            if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                return i, dim
    raise _Unfit("run-time-images", f"no input shows how many images there are, {size}")


def _relevance(graph: fx.Graph, found: _Found, node_of: dict[fx.Node, fx.Node]) -> Any:
    """[I P] the attention that the real tokens behind the image give to each of its own, mean over them and heads."""
    block, count, patches = found.probe, found.span.count, found.patches
    assert block is not None and found.span.mask is not None
    tensors: dict[str, Any] = {
        "hidden": node_of[block.stream],  # type: ignore[index]
        "query": node_of[block.query],
        "key": node_of[block.key],
        "inside": node_of[found.span.mask],
    }
    if isinstance(block.mask, fx.Node):
        tensors["mask"] = node_of[block.mask]
    scale = number(block.scale)

    def relevance(tensors: dict[str, Tensor]) -> Tensor:
        seen: dict[str, Any] = {name: x.detach() for name, x in tensors.items()}
        mask = seen.get("mask")
        if mask is not None and mask.dim() == 4:
            seen["valid"] = visible(mask)
        tokens = seen["query"].shape[2]
        numbers: dict[str, Any] = {"tokens": tokens, "span": count, "whole": count, "scale": scale}
        site = Site(layer=block.layer, depth=block.depth, causal=block.causal, **numbers, **seen)
        torch.ops.aten._assert_async.msg((seen["inside"].sum(-1) == count).all(), RAGGED)
        places = torch.arange(tokens, device=site.hidden.device)
        text = places > (seen["inside"] * places).amax(-1, keepdim=True)  # [B N]
        weight = (text * site.members()).to(site.members().dtype)
        given = site.flow(weight / weight.sum(-1, keepdim=True).clamp(min=1)).mean(1)  # [B N]
        return given.gather(1, site.candidates()).reshape(-1, patches)

    return record(graph, relevance, (tensors,))
