"""Where neurons and input channels can be left out: the values, and the linears that read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from tokred.compiler.blocks import Attention, Blocks, Mlp
from tokred.compiler.capture import module_path, source_line, tensor_meta
from tokred.compiler.causal import is_causal
from tokred.compiler.linears import Linear, attention_linears, find_loras
from tokred.registry.neurons import Neurons

__all__ = ["NeuronSite", "decodes", "find_experts", "find_neurons", "phase_of", "prompts"]


@dataclass(frozen=True, eq=False)
class NeuronSite:
    """One tensor of which a method may zero a part.

    block     the MLP or the attention that it belongs to
    values    the tensor: what `linears` read, or the activated gate of an MLP
    linears   whose weights are then read in part; none where their weights cannot be read off the graph
    measured  what a calibration calls it: "input", or "gate"
    place     what a method is told
    """

    block: Mlp | Attention
    values: fx.Node
    linears: tuple[Linear, ...]
    measured: str
    place: Neurons

    @property
    def channel(self) -> int:
        """The dimension of `values` that neurons or channels run along."""
        return self.linears[0].channel

    @property
    def readers(self) -> list[fx.Node]:
        """The nodes that are to read what a method leaves of the values."""
        gating = self.block.gating if isinstance(self.block, Mlp) and self.place.role == "gate" else None
        return [linear.node for linear in self.linears] if gating is None else [gating.product]

    def at(self, **changes: Any) -> NeuronSite:
        return replace(self, place=replace(self.place, **changes))


def find_neurons(gm: fx.GraphModule, blocks: Blocks) -> list[NeuronSite]:
    """All of them, in the order of the blocks: MLPs, then attentions."""
    sites = [site for mlp in blocks.mlps for site in _of_mlp(mlp)]
    loras = find_loras(gm)
    for block in blocks.attentions:
        linears = attention_linears(block, loras)
        sites += _reading(block, [linear for linear in linears if linear.node < block.anchor], "qkv", block.depth)
        sites += _reading(block, [linear for linear in linears if not linear.node < block.anchor], "out", block.depth)
    return sites


def _of_mlp(mlp: Mlp) -> Iterator[NeuronSite]:
    gating, depth = mlp.gating, mlp.depth
    if gating is not None:
        gate = tuple(linear for linear in mlp.inputs if _makes(linear, gating.gate.linear))
        size = _size(gating.activated, mlp.outputs[0].channel)
        place = Neurons(mlp.layer, depth, mlp.module, "gate", size)
        yield NeuronSite(mlp, gating.activated, gate[:1], "gate", place)
    yield from _reading(mlp, list(mlp.inputs), "up", depth)
    yield from _reading(mlp, list(mlp.outputs), "down", depth)


def _makes(linear: Linear, output: fx.Node) -> bool:
    """Whether this is the linear's output, or its sum with a LoRA branch's."""
    return output is linear.node or linear.node in output.all_input_nodes


def _reading(block: Mlp | Attention, linears: list[Linear], role: str, depth: int) -> Iterator[NeuronSite]:
    """One site for each input that some of these linears share."""
    groups: dict[fx.Node, list[Linear]] = {}
    for linear in sorted(linears, key=lambda linear: linear.node):
        groups.setdefault(linear.input, []).append(linear)
    for values, group in groups.items():
        place = Neurons(block.layer, depth, block.module, role, _size(values, group[0].channel))
        yield NeuronSite(block, values, tuple(group), "input", place)


def find_experts(gm: fx.GraphModule, blocks: Blocks) -> list[Mlp]:
    """MLPs of routed experts: one op, or two grouped products with stacked weights and element-wise ops between them.

    They are named, so that what is asked of them can be refused; no method acts on them.
    """
    grouped = [node for node in gm.graph.nodes if _groups(node)]
    found = [mlp for mlp in blocks.mlps if mlp.form == "routed"]
    for node in grouped:
        first = _grouped_before(node.all_input_nodes[0])
        if first is not None:
            place = (len(found), module_path(node), source_line(node))
            found.append(Mlp(node, [first], "experts", *place, tokens=_size(node, 0)))
    for mlp in found:
        mlp.depth = max(mlp.depth, len(found))
    return found


def _groups(node: fx.Node) -> bool:
    """A product of rows in groups, each with a weight of its own: [M I], [E I O], [E] -> [M O]."""
    metas = [tensor_meta(source) for source in node.all_input_nodes]
    ranks = [meta.dim() for meta in metas if meta is not None]
    return "grouped_mm" in str(node.target) and ranks[:3] == [2, 3, 1]


def _grouped_before(node: fx.Node) -> fx.Node | None:
    """The nearest grouped product that a value is computed from, through element-wise ops and splits."""
    queue, seen = [node], {node}
    while queue:
        current = queue.pop()
        if _groups(current):
            return current
        rows = tensor_meta(current)
        if rows is not None and rows.dim() < 2:
            continue
        queue += [source for source in current.all_input_nodes if source not in seen]
        seen.update(current.all_input_nodes)
    return None


def _size(node: fx.Node, channel: int) -> Any:
    meta = tensor_meta(node)
    assert meta is not None
    return meta.shape[channel]


def decodes(blocks: Blocks) -> bool:
    """Whether a graph computes one token of each sequence, with a cache of those before."""
    tokens = [tensor_meta(block.query).shape[-2] for block in blocks.attentions]  # type: ignore[union-attr]
    return bool(tokens) and all(isinstance(n, int) and n == 1 for n in tokens)


def prompts(blocks: Blocks) -> bool:
    """Whether a graph may be the first of a decoder's: its decoding comes in another graph."""
    return any(is_causal(block) for block in blocks.attentions if block.form == "self")


def phase_of(blocks: Blocks) -> str:
    """What a decoder's graph does: "begins" a prompt, "continues" one (several tokens behind a cache), or "decodes"
    (one token behind a cache); "" for all others, those among them whose cache has a fixed length.

    blocks   of the graph as it was captured
    """
    cached = [block.refusal is not None and block.refusal.code == "decode" for block in blocks.attentions]
    if decodes(blocks):
        keys = [tensor_meta(block.key).shape[-2] for block in blocks.attentions]  # type: ignore[union-attr]
        alone = all(isinstance(n, int) and n == 1 for n in keys)  # a prompt of one token
        return "decodes" if all(cached) else "begins" if alone else ""
    if any(cached):
        return "continues"
    return "begins" if prompts(blocks) else ""
