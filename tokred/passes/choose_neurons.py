"""Let a prompt's graph count its votes for neurons, and the graphs that decode behind it compute the chosen ones alone.

In the prompt the MLP stays as it is; [F] votes are one more result. While decoding, what is gathered of the weights
for the chosen neurons are inputs of the graph (tokred.compiler.requests), and the MLP is computed with these
(fewer_neurons). Where that cannot be, all neurons are computed and those that were not chosen are masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from tokred.compiler.axes import Axes
from tokred.compiler.blocks import Attention, Blocks
from tokred.compiler.capture import tensor_meta
from tokred.compiler.causal import is_causal
from tokred.compiler.extras import extra_input
from tokred.compiler.neurons import NeuronSite, phase_of
from tokred.compiler.record import record
from tokred.compiler.report import Refusal
from tokred.compiler.requests import Choice, Gathered, Key, Votes
from tokred.passes.fewer_neurons import Fewer, fewer_neurons, masked, shorter
from tokred.passes.site_tensors import visible
from tokred.registry.neurons import Chosen, Neurons

__all__ = ["Choosing"]


def shown_by(site: NeuronSite, blocks: Blocks, axes: Axes) -> Attention | Refusal | None:
    """The attention whose mask says which tokens of an MLP are padding; None where nothing hides any; or why it cannot
    be told."""
    mlp, masks = site.block, [block for block in blocks.attentions if block.masks]
    own = [block for block in masks if block.axis == mlp.axis]
    if not own and (not masks or any(block.axis == mlp.axis for block in blocks.attentions)):
        return None
    where = f"{mlp.module} ({mlp.source})" if mlp.module else mlp.source
    block = next((block for block in reversed(own) if block.anchor < site.values), own[0] if own else masks[0])
    if block.mask is None and own:
        return Refusal("no-sdpa", "the mask that tells what is padding is not one that SDPA takes", where)
    rows = [id(atom) for dim in axes.of(site.values)[:-1] for atom in dim]
    counted = own and block.mask is not None and block.mask < site.values and site.channel == -1
    if not counted or tuple(rows[len(rows) - len(block.axis) :]) != block.axis:
        return Refusal("layout", "its rows are not one sample's tokens behind the other's, which a mask counts", where)
    return block


def real_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """[..] False for padding, one for each row of `values` [.. F], from an attention's mask [.. N M].

    M is N, or more by what a cache holds.
    """
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))  # [B|1 H|1 N M]
    tokens = mask.shape[2]
    real = visible(mask)[:, mask.shape[3] - tokens :]  # [B|1 N]
    if values.dim() == 3:
        return real.expand(values.shape[:-1])
    return real.expand(values.shape[0] // tokens, tokens).flatten()


class Choosing:
    """What methods that choose neurons for a request do in one graph; `original` are its blocks as it was captured."""

    def __init__(
        self,
        gm: fx.GraphModule,
        blocks: Blocks,
        axes: Axes,
        original: Blocks,
        parameters: Mapping[str, Tensor],
        *,
        companion: bool,
    ):
        self.gm, self.blocks, self.axes, self.parameters, self.companion = gm, blocks, axes, parameters, companion
        self.phase = phase_of(original)
        self.fixed = any(block.refusal and block.refusal.code == "static-cache" for block in original.attentions)
        self.generated = {block.axis for block in blocks.attentions if is_causal(block)}
        self._fewer: dict[NeuronSite, Fewer | str] = {}
        self.begin()

    def begin(self) -> None:
        """Nothing is written yet."""
        self.gathered = Gathered()
        self.keys: list[Key] = []
        self.size = 0  # bytes that the chosen weights take
        self._votes: list[fx.Node] = []

    def unfit(self, site: NeuronSite, method: Chosen) -> Refusal | None:
        """Why the method cannot act at a site."""
        shown = None if self.phase == "decodes" else shown_by(site, self.blocks, self.axes)
        where = f"{site.block.module} ({site.block.source})" if site.block.module else site.block.source
        if method.phase == "masked":
            return shown if isinstance(shown, Refusal) else None
        if self.fixed:
            reason = "keys are written into a cache of fixed length: where the prompt in it ends does not show"
            return Refusal("static-cache", reason, where)
        if not self.phase:
            return Refusal("no-decode", f"{method.name} acts while decoding, which this is no model for", where)
        if self.phase == "begins" and self.generated and site.block.axis not in self.generated:
            return Refusal("prefill", "these tokens are an encoder's, behind which none are generated", where)
        if not self.companion:
            reason = "which prompt a token is generated behind shows in tokred.compile(model) alone"
            return Refusal("no-request", reason, where)
        return shown if isinstance(shown, Refusal) else None

    def fewer(self, site: NeuronSite, method: Chosen) -> Fewer | str:
        """How the MLP decodes with fewer neurons; or why it masks the others."""
        if site not in self._fewer:
            self._fewer[site] = fewer_neurons(site, method.kept(site.place), self.axes, self.parameters)
        return self._fewer[site]

    def decodes_fewer(self, site: NeuronSite, method: Chosen) -> bool:
        """Whether this graph reads the weights of chosen neurons alone."""
        decoding = self.phase == "decodes" and method.phase == "decode"
        return decoding and isinstance(self.fewer(site, method), Fewer)

    def words(self, site: NeuronSite, method: Chosen) -> str:
        """What is done at a site, for the report."""
        if method.phase == "masked":
            return f"{method.words(site.place)}, by masking"
        if self.phase != "decodes":
            return f"{method.words(site.place)} are chosen, all are computed"
        fewer = self.fewer(site, method)
        return method.words(site.place) + ("" if isinstance(fewer, Fewer) else f" by masking: {fewer}")

    def write(
        self, graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], site: NeuronSite, method: Chosen
    ) -> list[fx.Node]:
        """Do that in a copy of the graph; returns what is new there and read by what was there."""
        shown = None if self.phase == "decodes" else shown_by(site, self.blocks, self.axes)
        mask = copies[shown.mask] if isinstance(shown, Attention) and shown.mask is not None else None
        readers = list(site.values.users)  # LoRA branches too
        if method.phase == "masked":
            function = partial(_masked, method=method, place=site.place)
            return [masked(graph, copies, site, function, mask, readers=readers)]
        key = (str(method), site.linears[0].name, site.place.layer)
        if self.phase != "decodes":
            self._vote(graph, copies[site.values], mask, site, method)
            self.keys.append(key)
            return []
        fewer = self.fewer(site, method)
        if isinstance(fewer, Fewer):
            numbers = {node: i for i, node in enumerate(self.gm.graph.find_nodes(op="placeholder"))}
            gathered = fewer.weights(key, numbers)
            inputs = [self._input(graph, choice, shorter(node.meta["val"], choice)) for node, choice in gathered]
            return fewer.write(graph, copies, inputs)
        values: Any = tensor_meta(site.values)
        with values.fake_mode:
            fake = torch.empty(values.shape[site.channel], dtype=torch.bool, device=values.device)
        chosen = self._input(graph, Choice(key, method.kept(site.place)), fake)
        return [masked(graph, copies, site, _where, chosen, readers=readers)]

    def _input(self, graph: fx.Graph, choice: Choice, fake: Tensor) -> fx.Node:
        self.gathered.choices.append(choice)
        self.size += fake.nbytes
        return extra_input(graph, f"tokred_chosen_{len(self.gathered.choices)}", self.gathered, fake)

    def _vote(self, graph: fx.Graph, values: fx.Node, mask: fx.Node | None, site: NeuronSite, method: Chosen) -> None:
        def votes(x: Tensor, mask: Tensor | None) -> Tensor:
            x = x.detach().movedim(site.channel, -1)
            return method.counted(x, None if mask is None else real_tokens(x, mask))

        with graph.inserting_before(graph.output_node()):
            self._votes.append(record(graph, votes, (values, mask)))

    def finish(self, graph: fx.Graph) -> Votes | None:
        """Return the votes behind the graph's results; who takes them. A prompt's graph in which none can vote has such
        a one too: what the last prompt in its cache chose is over."""
        if self.phase not in ("begins", "continues"):
            return None
        output = graph.output_node()
        results: Any = output.args[0]
        output.args = ((*results, *self._votes),)
        return Votes(self.keys, begins=self.phase == "begins")


def _masked(values: Tensor, mask: Tensor | None, *, method: Chosen, place: Neurons) -> Tensor:
    return method.masked(values, place, None if mask is None else real_tokens(values, mask))


def _where(values: Tensor, chosen: Tensor) -> Tensor:
    return torch.where(chosen, values, 0.0)
