"""Fold low-rank branches into the linears beside them, or leave out their ranks that are zero: the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import linear as dense_linear

from tokred.compiler.blocks import Attention, Blocks, Mlp
from tokred.compiler.capture import module_path, source_line, tensor_meta, trace_into
from tokred.compiler.graphs import between
from tokred.compiler.linears import Linear, Lora, attention_linears, find_loras, unwrapped, wrapping
from tokred.compiler.record import record
from tokred.compiler.relaid import made_inputs, untracked
from tokred.compiler.relations import Op
from tokred.compiler.report import Refusal
from tokred.passes.graph_edit import copy_graph, inherit, keep_output_strides, refresh
from tokred.passes.indices import same_shape
from tokred.registry.sparsify.lora_prune import Branch, Kept, LoraPrune, Merged, precise

__all__ = ["Folded", "fold_loras"]

aten = torch.ops.aten

Block = Mlp | Attention


@dataclass
class Folded:
    """The rewritten graph; at which blocks which method acted, in words, and why not at others; a line for each linear,
    and each refusal, of linears outside of blocks too."""

    graph: fx.GraphModule
    applied: dict[Block, tuple[LoraPrune, str]] = field(default_factory=dict)
    refused: dict[Block, tuple[LoraPrune, Refusal]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    name: str = LoraPrune.name


@dataclass(frozen=True)
class _Owner:
    """The block that a linear belongs to, if there is one, and of how many layers it is in one."""

    block: Block | None
    depth: int = 0

    def means(self, method: LoraPrune, base: Linear) -> bool:
        """Whether `layers` names this linear: by its block, or as a glob by its own name."""
        module = module_path(base.node)
        if self.block is None:
            named = isinstance(method.layers, str) and ":" not in method.layers
            return method.layers is None or (named and method.acts_on(0, 0, module))
        return any(method.acts_on(self.block.layer, self.depth, name) for name in (self.block.module, module))


def fold_loras(
    gm: fx.GraphModule, blocks: Blocks, methods: Sequence[LoraPrune], parameters: Mapping[fx.Node, Any]
) -> Folded:
    """What the first of the methods that means a linear makes of the branches beside it.

    blocks       those of `gm`, with their layers' numbers in the model
    parameters   by placeholder, with the values that they have now
    """
    done = Folded(gm)
    found = find_loras(gm)
    beside: dict[fx.Node, list[Lora]] = {}
    for lora in found.values():
        beside.setdefault(lora.base.node, []).append(lora)
    if not beside:
        done.refusals.append(Refusal("no-lora", "no linear has a low-rank branch beside it that reads the same input"))
    owners = _owners(blocks, found)
    chosen: list[tuple[LoraPrune, list[Lora]]] = []
    counts: dict[Block, list[tuple[int, int]]] = {}
    for node, loras in beside.items():
        owner = owners.get(node, _Owner(None))
        method = next((m for m in methods if owner.means(m, loras[0].base)), None)
        if method is None:
            continue
        refusal = _unfit(loras, method, parameters)
        if refusal is not None:
            done.refusals.append(refusal)
            if owner.block is not None:
                done.refused.setdefault(owner.block, (method, refusal))
            continue
        chosen.append((method, loras))
        ranks, zero = _ranks(loras, parameters)
        does = "merged into its weight" if method.merge else "the others kept beside it"
        done.lines.append(f"{loras[0].base.name}: {zero} of {ranks} ranks are zero, {does}")
        if owner.block is not None:
            counts.setdefault(owner.block, []).append((ranks, zero))
            ranks, zero = map(sum, zip(*counts[owner.block], strict=True))
            where = f"beside {len(counts[owner.block])} linears {zero} of {ranks} ranks are zero"
            done.applied[owner.block] = (method, f"{where}, {'the others merged' if method.merge else 'and left out'}")
    if chosen:
        _rewrite(done, gm, chosen, parameters)
    return done


def _owners(blocks: Blocks, loras: dict[fx.Node, Lora]) -> dict[fx.Node, _Owner]:
    """By its node the owner of each linear of an attention or an MLP."""
    owners: dict[fx.Node, _Owner] = {}
    for block in blocks.attentions:
        owners |= {linear.node: _Owner(block, block.depth) for linear in attention_linears(block, loras)}
    for mlp in blocks.mlps:
        depth = 1 + max(other.layer for other in blocks.mlps if other.axis == mlp.axis)
        owners |= {linear.node: _Owner(mlp, depth) for linear in (*mlp.inputs, *mlp.outputs)}
    return owners


def _unfit(loras: list[Lora], method: LoraPrune, parameters: Mapping[fx.Node, Any]) -> Refusal | None:
    """Why the branches beside one linear stay as they are; None if they are folded."""
    base = loras[0].base
    where = f"{module_path(base.node)} ({source_line(base.node)})" if module_path(base.node) else source_line(base.node)
    for lora in loras:
        if reason := _unusual(lora, method):
            return Refusal("branch", reason, where)
        if any(_drops(node) for node in between(unwrapped(base.input), lora.join)):
            return Refusal("dropout", "the branch drops numbers at random, as in training", where)
    for lora in loras:
        for node in (base.weight, lora.down.weight, lora.up.weight, *lora.gates):
            value = parameters.get(node) if node is not None else None
            if node is None or not isinstance(value, Tensor) or isinstance(value, FakeTensor):
                return Refusal("weight", "the weight of the linear, or of its branch, is no input of the graph", where)
            if reason := untracked(value):
                return Refusal("gradient", f"{node.meta.get('parameter') or node}: {reason}", where)
    return None


def _unusual(lora: Lora, method: LoraPrune) -> str:
    """What there is about a branch that folding would change, as a sentence; "" if nothing."""
    if any(linear.channel != -1 for linear in (lora.base, lora.down, lora.up)):
        return "the linear is written as a convolution"
    if lora.down.bias is not None or lora.up.bias is not None:
        return "its low-rank branch has a bias"
    operand, branch = (lora.join.args[place] for place in (lora.place, 1 - lora.place))
    shapes = [meta.shape for node in (lora.join, operand, branch) if (meta := tensor_meta(node)) is not None]
    if len(shapes) < 3 or not same_shape(shapes[0], shapes[1]) or not same_shape(shapes[0], shapes[2]):
        return "its low-rank branch is added in another shape"
    if not method.merge and not same_shape(shapes[2][:-1], lora.down.input.meta["val"].shape[:-1]):
        return "its low-rank branch is added in another shape than it reads its input"
    assert isinstance(operand, fx.Node)
    before = list(wrapping(operand))
    if method.merge and any(len(node.users) > 1 for node in before):
        return "what the linear gives is read without its low-rank branch too"
    return ""


def _drops(node: fx.Node) -> bool:
    if node.target is not aten.dropout.default:
        return False
    op = Op(node)
    return bool(op["train"]) and op["p"] != 0


def _ranks(loras: list[Lora], parameters: Mapping[fx.Node, Any]) -> tuple[int, int]:
    """How many ranks the branches have, and how many of them are zero."""
    total = left = 0
    for lora in loras:
        branch, weights = _read(lora)
        values = [parameters[node].detach() for node in weights]
        total += values[0].shape[0 if branch.down else 1]
        left += len(branch.factors(values, precise(*values))[0])
    return total, total - left


def _read(lora: Lora) -> tuple[Branch, list[fx.Node]]:
    """How a branch is to be read, and the nodes of its parameters."""
    assert lora.down.weight is not None and lora.up.weight is not None
    branch = Branch(float(lora.scale), len(lora.gates), lora.down.rows, lora.up.rows)
    return branch, [lora.down.weight, lora.up.weight, *lora.gates]


# -- the rewrite ------------------------------------------------------------------------------------------------------


def _rewrite(
    done: Folded,
    gm: fx.GraphModule,
    chosen: list[tuple[LoraPrune, list[Lora]]],
    parameters: Mapping[fx.Node, Any],
) -> None:
    copy = copy_graph(gm)
    copies = dict(zip(gm.graph.nodes, copy.graph.nodes, strict=True))
    changed: list[fx.Node] = []
    for method, loras in chosen:
        if method.merge:
            changed += _merge(copy.graph, copies, loras)
        else:
            changed += [_keep(copy.graph, copies, lora, _left(lora, parameters)) for lora in loras]
    refresh(copy.graph, changed)
    keep_output_strides(copy, gm)
    copy.graph.eliminate_dead_code()
    copy.recompile()
    done.graph = copy


def _left(lora: Lora, parameters: Mapping[fx.Node, Any]) -> int:
    ranks, zero = _ranks([lora], parameters)
    return ranks - zero


def _merge(graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], loras: list[Lora]) -> list[fx.Node]:
    """Let the linear multiply by W', and what read the sums read what it gives."""
    base = loras[0].base
    assert base.weight is not None
    read = [_read(lora) for lora in loras]
    weight, node = copies[base.weight], copies[base.node]
    sources = [weight, *(copies[parameter] for _, nodes in read for parameter in nodes)]
    make = Merged(tuple(branch for branch, _ in read), base.rows)
    made = _made(graph, sources, make, weight.meta["val"].shape, weight, f"{weight.name}_merged")
    before = set(graph.nodes)
    plain = node.target is aten.linear.default
    if plain != base.rows:  # the model transposes it
        with graph.inserting_before(node):
            made = record(graph, torch.t, (made,))
    node.replace_input_with(Op(node).operand("weight" if plain else "mat2"), made)
    changed = [node]
    for lora in loras:
        join = copies[lora.join]
        value: Any = join.args[lora.place]
        if value.meta["val"].dtype != join.meta["val"].dtype:
            with graph.inserting_before(join):
                value = record(graph, partial(torch.Tensor.to, dtype=join.meta["val"].dtype), (value,))
        join.replace_all_uses_with(value)
        changed.append(value)
    inherit([n for n in graph.nodes if n not in before and n.op == "call_function"], node)
    return changed


def _keep(graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], lora: Lora, ranks: int) -> fx.Node:
    """Compute the branch with the ranks that are not zero; returns what is added now."""
    branch, nodes = _read(lora)
    sources = [copies[node] for node in nodes]
    down, up, *_ = sources
    wide, tall = lora.down.input.meta["val"].shape[-1], lora.join.meta["val"].shape[-1]
    first = _made(graph, sources, Kept(branch, ranks, up=False), (ranks, wide), down, f"{down.name}_kept")
    second = _made(graph, sources, Kept(branch, ranks, up=True), (tall, ranks), up, f"{up.name}_kept")
    join, before = copies[lora.join], set(graph.nodes)
    old = join.args[1 - lora.place]
    assert isinstance(old, fx.Node)
    dtype = old.meta["val"].dtype

    def product(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return dense_linear(dense_linear(x.to(down.dtype), down).to(up.dtype), up).to(dtype)

    with graph.inserting_before(join):  # as aten.linear, in which the number of ranks is no constant
        new: fx.Node = trace_into(graph, product, (copies[lora.down.input], first, second))
    inherit([node for node in graph.nodes if node not in before], copies[lora.down.node])
    join.replace_input_with(old, new)
    return new


def _made(
    graph: fx.Graph, sources: list[fx.Node], make: Any, shape: tuple[int, ...], parameter: fx.Node, name: str
) -> fx.Node:
    fake = parameter.meta["val"]
    with fake.fake_mode, torch.no_grad():
        like = torch.empty(shape, dtype=fake.dtype, device=fake.device)
    return made_inputs(graph, sources, make, [like], name)[0]
