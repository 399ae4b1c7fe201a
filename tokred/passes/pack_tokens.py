"""Masked-key compaction: a padded batch computes its real tokens only.

Between the embeddings and the pooling, values are kept as [1 T C]: the T real rows of all samples one after the other.
What works row by row runs on them as it would on one sample. At each attention q, k and v are put back into their
padded form [B H N D], with zeros where nothing is, SDPA runs with the model's own mask, and its rows are packed again.

Which rows are real is computed at run time from all that reads rows (padding.py): so nothing that is left out was ever
read. Where something reads rows that cannot be told at run time, the graph is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from tokred.compiler.axes import Axes, Dim
from tokred.compiler.blocks import Attention, find_blocks
from tokred.compiler.capture import source_line, tensor_meta
from tokred.compiler.machine import Machine
from tokred.compiler.options import Options
from tokred.compiler.relations import Op, same
from tokred.compiler.report import Refusal
from tokred.compiler.residual import residual_of
from tokred.compiler.staging import Stage
from tokred.compiler.work import flops, moved
from tokred.passes.pack_rows import Pack
from tokred.passes.padding import PaddingIsRead
from tokred.passes.real_rows import is_grid, layout_of

__all__ = ["Packing", "pack_tokens"]

aten = torch.ops.aten

RUN_TIME_KERNELS = 5  # nonzero, and the places of the real rows: see by_padding
SDPA = aten.scaled_dot_product_attention.default


@dataclass
class Packing:
    """Two graphs for one. `real` returns which rows anyone reads, [B N]; `packed` computes these rows alone.

    Both take the inputs of the graph that they are made from; `packed` takes three more: the numbers of the real rows
    [T], their mask [B N] and for each place [B N] which real row is there. `worth` is the share of padding above which
    the packed graph pays.
    """

    real: fx.GraphModule
    packed: fx.GraphModule
    blocks: int
    worth: float

    def __str__(self) -> str:
        return f"{self.blocks} attention blocks run on real tokens only where more than {self.worth:.0%} are padding"


def pack_tokens(gm: fx.GraphModule, options: Options) -> Packing | Refusal | None:
    """Both graphs, or why not; None where no attention of two or more samples has a mask."""
    if not any(node.target is SDPA and Op(node)["attn_mask"] is not None for node in gm.graph.nodes):
        return None
    axes = Axes(gm.graph)
    refusal = None
    tried = set()
    for block in find_blocks(gm, axes).attentions:
        if block.anchor.target is not SDPA or block.mask is None or block.form != "self" or block.axis in tried:
            continue
        tried.add(block.axis)
        query = axes.of(block.query)
        if len(query) != 4 or not query[0] or not query[2] or set(query[0]) & set(query[2]):
            continue
        if options.mode in ("reduce-overhead", "max-autotune") and block.anchor.meta["val"].is_cuda:
            return Refusal("cuda-graphs", "CUDA graphs would be recorded for every number of rows", block.source)
        if options.recipe.methods:
            return Refusal("recipe", "tokens that a recipe leaves out are not packed as well", block.source)
        for starts in _beginnings(block, query[0], query[2], axes):
            try:
                pack = Pack(gm, axes, query[0], query[2], starts)
                packed = pack.run()
                real = pack.claims.build(gm, block.anchor.meta["val"].device)
                return Packing(real, packed, pack.attentions, share_that_pays(pack, real))
            except PaddingIsRead as obstacle:
                refusal = refusal or Refusal(obstacle.code, str(obstacle), source_line(obstacle.node))
    return refusal


def share_that_pays(pack: Pack, real: fx.GraphModule) -> float:
    """The share of padding from which on fewer rows save twice what looking for them and moving them costs.

    Raises PaddingIsRead where looking alone would slow batches without padding by more than 3 %, or where more than
    half of a batch would have to be padding.
    """
    machine = Machine.of(real.graph.output_node().args[0][0].meta["val"].device)  # type: ignore[index, union-attr]
    looks = [node for node in real.graph.nodes if node.op == "call_function"]
    work: dict[torch.dtype, float] = defaultdict(float)
    for node in pack.work:
        work[node.meta["val"].dtype if tensor_meta(node) is not None else torch.float32] += flops(node)
    saved = machine.seconds(work, sum(moved(node) for node in pack.work))
    look = machine.seconds({}, sum(moved(node) for node in looks), len(looks) + RUN_TIME_KERNELS)
    share = 2 * (look + machine.seconds({}, pack.real.copied)) / saved if saved else 1.0
    if look > 0.03 * saved or share > 0.5:
        costs, gains = 1e3 * (look + machine.seconds({}, pack.real.copied)), 1e3 * saved
        text = f"to find and to move the real rows costs {costs:.2g} ms, and all rows together {gains:.2g} ms"
        raise PaddingIsRead("does-not-pay", text, pack.work[0])
    return max(share, 0.05)


def _beginnings(block: Attention, batch: Dim, tokens: Dim, axes: Axes) -> Iterator[set[fx.Node]]:
    """Where packing may begin: at the embeddings, or else at the residual stream that enters the first attention."""
    starts, seen, queue = set(), {block.query}, [block.query]
    while queue:
        node = queue.pop()
        above = [n for n in _operands(node) if _has_features(n, batch, tokens, axes)]
        if not above:
            starts.add(node)
        queue += [n for n in above if n not in seen]
        seen.update(above)
    yield starts
    stream = residual_of(block.join) if block.join is not None else None
    if stream is not None and _has_features(stream, batch, tokens, axes) and {stream} != starts:
        yield {stream}


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    """What a node is computed from, where one part of several results is taken as one step."""
    for source in node.all_input_nodes:
        if isinstance(source.meta.get("val"), (tuple, list)):
            yield from _operands(source)
        else:
            yield source


def _has_features(node: fx.Node, batch: Dim, tokens: Dim, axes: Axes) -> bool:
    """One row of features for each token: masks have no features, ids are no floats."""
    meta = tensor_meta(node)
    if meta is None or not meta.is_floating_point() or not axes.knows(node):
        return False
    layout = layout_of(axes.of(node), batch, tokens, Stage(0))
    others = [size for dim, size in enumerate(meta.shape) if dim not in layout]
    return is_grid(layout) and not all(same(size, 1) for size in others)
