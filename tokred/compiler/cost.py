"""What the rewrite is worth: FLOPs of graphs and blocks for the report, and whether a site pays, in seconds."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokred.compiler.axes import Axes
from tokred.compiler.blocks import Attention, Blocks, Mlp
from tokred.compiler.capture import module_path, tensor_meta
from tokred.compiler.machine import Extent, Machine, method_seconds
from tokred.compiler.relations import Op
from tokred.compiler.report import Refusal
from tokred.compiler.suffix import Suffix
from tokred.compiler.symbolic import Symbols
from tokred.compiler.work import flops, hint, sizes_now
from tokred.registry.attention import AttentionRewrite
from tokred.registry.method import Reduction
from tokred.registry.site import Place

__all__ = ["Costs", "Gate", "Prediction", "Skipped", "pays_from", "predict_attention", "predict_neurons"]

LONGEST = 1 << 24  # tokens: farther than any prompt

Key = tuple[str, str]  # module path and user's lines: what a node keeps when it is rewritten
Ledger = dict[Key, list[tuple[fx.Node, int]]]


class Costs:
    """FLOPs of the captured and of the rewritten graph, whole and by block.

    The nodes of the two graphs are told by where they came from: the rewrite keeps module and source lines.
    """

    def __init__(self, captured: fx.GraphModule, final: fx.GraphModule):
        self._ledgers = (_ledger(captured), _ledger(final))

    def totals(self) -> tuple[int, int]:
        return self._pair(lambda key: True, 0, 1)

    def block(self, module: str, call: int = 0, calls: int = 1, without: Iterable[fx.Node] = ()) -> tuple[int, int]:
        """Everything in a module. Of a module that runs `calls` times (shared layers), the run number `call`.

        `without` are nodes that belong to another block of the same module.
        """
        other = {_key(node) for node in without}
        return self._pair(lambda key: _inside(key[0], module) and key not in other, call, calls)

    def became(self, node: fx.Node) -> fx.Node | None:
        """The product of the rewritten graph that does the work of a product of the captured one."""
        before, after = (ledger.get(_key(node), []) for ledger in self._ledgers)
        if len(before) != len(after):
            return None
        return next((new for (old, _), (new, _) in zip(before, after, strict=True) if old is node), None)

    def nodes(self, nodes: Iterable[fx.Node]) -> tuple[int, int]:
        """These products of the captured graph, and what became of them."""
        before = after = 0
        for node in nodes:
            new = self.became(node)
            before += flops(node)
            gone = new is None and not self._ledgers[1].get(_key(node))  # another product does its work
            after += 0 if gone else flops(node if new is None else new)
        return before, after

    def _pair(self, wanted: Callable[[Key], bool], call: int, calls: int) -> tuple[int, int]:
        def total(ledger: Ledger) -> int:
            return sum(_share([n for _, n in entries], call, calls) for key, entries in ledger.items() if wanted(key))

        before, after = self._ledgers
        return total(before), total(after)


def _ledger(gm: fx.GraphModule) -> Ledger:
    """Every product and its FLOPs, in order, by where it came from."""
    ledger: Ledger = defaultdict(list)
    for node in gm.graph.nodes:
        if count := flops(node):
            ledger[_key(node)].append((node, int(count)))
    return ledger


def _key(node: fx.Node) -> Key:
    return module_path(node), node.meta.get("stack_trace") or ""


def _inside(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(module + ".")


def _share(counts: list[int], call: int, calls: int) -> int:
    """The part of one call; evenly, where the calls cannot be told apart."""
    if len(counts) % calls:
        return sum(counts) // calls
    each = len(counts) // calls
    return sum(counts[call * each : (call + 1) * each])


@dataclass(frozen=True)
class Skipped:
    """Weights of which a share is not read, for values [.. F] that are expected to be `active` to that share."""

    values: torch.Tensor
    weights: int  # how many numbers they are
    kernels: int
    active: float
    together: bool = False  # whether all rows have the same active ones


@dataclass(frozen=True)
class Prediction:
    """Seconds that a site saves downstream, and that it costs: choosing tokens, moving them, restoring them."""

    saves: float
    costs: float

    @property
    def pays(self) -> bool:
        return self.saves >= self.costs

    def __str__(self) -> str:
        verdict = "" if self.pays else ": does not pay"
        return f"saves {1e3 * self.saves:.2g} ms, costs {1e3 * self.costs:.2g} ms{verdict}"


class Gate:
    """Asked before a method acts at a site: predicts what that is worth on this machine, and may refuse it.

    The prediction is the cost polynomial of all nodes that would run on fewer tokens, at the present number of tokens
    less at the number left, against what the method, its gathers and its restores cost. `notes` has it in words.
    """

    def __init__(
        self, graph: fx.GraphModule, blocks: Blocks, axes: Axes, *, refuse: bool, machine: Machine | None = None
    ):
        self.graph, self.blocks, self.axes = graph, blocks, axes
        self.refuse, self.machine = refuse, machine
        self.predictions: dict[Attention, Prediction] = {}
        self.notes: dict[Attention, str] = {}
        self._symbols: dict[tuple[int, ...], Symbols] = {}

    def __call__(
        self, block: Attention, method: Reduction, place: Place, removed: Any, suffix: Suffix
    ) -> Refusal | None:
        """None where the method may act."""
        found = self.predict(block, method, place, removed, suffix)
        self.predictions[block] = found
        self.notes[block] = str(found)
        if found.pays or not self.refuse:
            return None
        reason = f"predicted to save {1e3 * found.saves:.2g} ms and cost {1e3 * found.costs:.2g} ms"
        return Refusal("does-not-pay", reason, f"{block.module} ({block.source})" if block.module else block.source)

    def predict(self, block: Attention, method: Reduction, place: Place, removed: Any, suffix: Suffix) -> Prediction:
        """What the site saves and costs, in seconds."""
        if block.axis not in self._symbols:
            self._symbols[block.axis] = Symbols(self.axes, self.blocks, block.axis)
        end = self.blocks.end_of_layer(block) if method.skips else None
        site = _Site(block, method, end, hint(place.tokens), hint(removed), suffix, self._symbols[block.axis])
        stream = tensor_meta(block.stream)
        assert stream is not None
        machine = self.machine or Machine.of(stream.device)
        query = sizes_now(block.query)
        extent = Extent(
            batch=hint(stream.shape[block.batch_dim]),
            tokens=site.now,
            removed=site.removed,
            channels=hint(stream.shape[-1]),
            heads=query[1] if len(query) == 4 else 1,
            head_dim=query[-1],
            dtype=stream.dtype,
        )
        moved, kernels = site.carried()
        costs = method_seconds(method, extent, machine) + machine.seconds({}, moved, kernels)
        return Prediction(site.saved(machine), costs)

    def attention(self, block: Attention, method: AttentionRewrite, node: fx.Node) -> tuple[str, Refusal | None]:
        """The same for a method that computes the SDPA at `node` in another way: the prediction in words, and whether
        that refuses it."""
        machine = self.machine or Machine.of(node.meta["val"].device)
        tokens = sizes_now(Op(node).operand("query"))[2]
        found = predict_attention(method, node, tokens, machine)
        start = pays_from(lambda n: predict_attention(method, node, n, machine).pays, method.shortest or 1)
        words = f"{found}; {'never pays' if start is None else f'pays from {start} tokens on'}"
        words = f"{words}, {method.assumes}" if method.assumes else words
        if found.pays or not self.refuse:
            return words, None
        where = f"{block.module} ({block.source})" if block.module else block.source
        return words, Refusal("does-not-pay", f"predicted for {tokens} tokens: {words}", where)

    def neurons(self, block: Attention | Mlp, skipped: list[Skipped]) -> tuple[str, Refusal | None]:
        """The same for weights that are not read; "" where none are skipped, or nobody knows how many."""
        known = [part for part in skipped if part.active < 1]
        if not known:
            return "", None
        found = predict_neurons(known, self.machine or Machine.of(known[0].values.device))
        if found.pays or not self.refuse:
            return str(found), None
        where = f"{block.module} ({block.source})" if block.module else block.source
        return str(found), Refusal("does-not-pay", f"predicted: {found}", where)


def predict_neurons(skipped: Iterable[Skipped], machine: Machine) -> Prediction:
    """What is saved where weights are read only if one of the rows needs them, as if each drew its own, in seconds."""
    saves = costs = 0.0
    for part in skipped:
        rows = math.prod(hint(size) for size in part.values.shape[:-1])
        dtype, unread = part.values.dtype, (1 - part.active) ** (1 if part.together else rows)
        flops = 2.0 * rows * part.weights * (1 - part.active)
        saves += machine.seconds({dtype: flops}, part.weights * dtype.itemsize * unread)
        costs += machine.seconds({}, 0, part.kernels)
    return Prediction(saves, costs)


def predict_attention(method: AttentionRewrite, node: fx.Node, tokens: int, machine: Machine) -> Prediction:
    """What a method saves of an SDPA that has as many tokens, and what it costs, in seconds."""
    op = Op(node)
    batch, heads, _, channels = sizes_now(op.operand("query"))
    width, dtype = sizes_now(op.operand("value"))[-1], node.meta["val"].dtype
    effort = method.effort(tokens, channels)
    dense = tokens * (tokens + 1) / 2 if op["is_causal"] else tokens**2  # a mask's pairs are computed, then hidden
    saved = 2 * batch * heads * (channels + width) * (dense - effort.attended)
    compared = 2 * batch * heads * channels * effort.compared
    moved = batch * heads * effort.moved * dtype.itemsize
    return Prediction(
        machine.seconds({dtype: saved}, 0), machine.seconds({dtype: compared}, moved, batch * effort.kernels)
    )


def pays_from(pays: Callable[[int], bool], shortest: int) -> int | None:
    """The number of tokens from which on a method pays; None if it does not at any length up to LONGEST."""
    low, high = shortest - 1, shortest
    while not pays(high):
        low, high = high, 2 * high
        if high > LONGEST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high


class _Site:
    """One cut and what follows from it."""

    def __init__(
        self,
        block: Attention,
        method: Reduction,
        end: fx.Node | None,
        now: int,
        removed: int,
        suffix: Suffix,
        symbols: Symbols,
    ):
        self.block, self.now, self.removed, self.suffix, self.symbols = block, now, removed, suffix, symbols
        trip = method.scope == "round_trip"
        self.exit = block.join if trip else end  # where all rows are back, if they are anywhere
        self.cut = block.entry if trip else block.stream
        parts = {user for node in suffix.reached for user in node.users if user.target is operator.getitem}
        self.short = suffix.reached | parts  # everything that has fewer tokens, or is full again behind a round trip
        self.reached = {node for node in self.short if self._before_exit(node)}

    def _before_exit(self, node: fx.Node) -> bool:
        return self.exit is None or node < self.exit

    def saved(self, machine: Machine) -> float:
        """Seconds that the nodes on the cut axis take now, less what they take on the rows that are left.

        A node whose sizes do not show the axis (it was concatenated or regrouped) is taken to be proportional to it.
        """
        shown = {node for node in self.reached if self._shows(node)}
        total, rest = self.symbols.total(shown), self.symbols.total(self.reached - shown)
        before, after = total.at(N=self.now), total.at(N=self.now - self.removed)
        other = rest.at()
        share = self.removed / self.now
        seconds = machine.seconds(before.flops, before.moved) - machine.seconds(after.flops, after.moved)
        return seconds + share * machine.seconds(other.flops, other.moved)

    def _shows(self, node: fx.Node) -> bool:
        return any(self._has_tokens(n) for n in [node, *node.all_input_nodes])

    def _has_tokens(self, node: fx.Node) -> bool:
        names = self.symbols.tokens.free_symbols
        return any(names & getattr(size, "free_symbols", set()) for size in self.symbols.sizes(node))

    def carried(self) -> tuple[float, int]:
        """Bytes and kernels for values that are brought to another length because of this cut.

        Tokens are restored for ops that need all of them, for the graph's outputs and at the end of a round trip; side
        inputs (masks, rotary tables, skip connections) are reduced where they meet the shorter stream.
        """
        restored: set[fx.Node] = set()
        for node, _ in self.suffix.obstacles:
            if self._before_exit(node):
                restored |= {n for n in node.all_input_nodes if n in self.reached or n is self.cut}
        if self.exit is not None:
            restored |= {n for n in self.exit.all_input_nodes if n in self.reached}
        else:
            restored |= {n for n in self._outputs() if n in self.reached and self._has_tokens(n)}
        shortened = {
            n
            for node in self.reached
            for n in node.all_input_nodes
            if n is not self.cut and n not in self.short and self._has_tokens(n)
        }
        touched = restored | shortened
        return sum(2.0 * self._bytes(node) for node in touched), len(touched)

    def _outputs(self) -> list[fx.Node]:
        node = next(iter(self.reached), None)
        return [] if node is None else list(node.graph.output_node().all_input_nodes)

    def _bytes(self, node: fx.Node) -> int:
        total = 1
        meta = tensor_meta(node)
        for size in sizes_now(node):
            total *= size
        return 0 if meta is None else total * meta.element_size()
