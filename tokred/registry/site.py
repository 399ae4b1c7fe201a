"""What a method sees: the place (plain numbers) and the site (the place with its tensors). Never a graph or a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor

from tokred.backends.kernels.column_sums import column_sums
from tokred.registry.maps import Keep, partition

__all__ = ["Place", "Site", "Tower", "precise"]


def precise(x: Tensor) -> Tensor:
    """In float32 or better, for scores whose order decides."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a method may act: numbers only, known before anything is traced.

    layer   number of this attention block on its token axis, from 0
    depth   how many attention blocks that axis has
    tokens  N, before this site
    head    protected tokens at the front, which keep their rows (class, distillation, registers)
    tail    the same at the back
    span    how many unprotected tokens there are where they do not lie between head and tail: those of a visual span
            at other places in each sample. None where they do
    whole   the number of unprotected tokens before anything was removed from this axis
    grid    rows and columns of the patches between head and tail, where they still form a grid
    images  how many images of a sample the visual span was made of, where the vision encoder shows it
    """

    layer: int
    depth: int
    tokens: Any
    head: int = 0
    tail: int = 0
    span: Any = None
    whole: Any = None
    grid: tuple[int, int] | None = None
    images: int | None = None

    @property
    def free(self) -> Any:
        """How many tokens are not protected."""
        return self.tokens - self.head - self.tail if self.span is None else self.span

    def count(self, keep: float) -> Any:
        """How many unprotected tokens stay if the fraction `keep` of them does, rounded up as EViT does."""
        return ceil(keep * self.free - 1e-9)


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The vision encoder's last layer, for each of the S visual tokens of a sample, in their order.

    hidden    [B S C']  its residual stream, from which each visual token was projected by itself
    key       [B S D]   mean over heads of the keys
    attention [B S]     the class token's attention, mean over heads; without such a token the mean of all tokens'
    earlier   [B L S]   the same in the L earlier layers that the method's `encoder_layers` names
    patches             how many visual tokens one image has; S is as many times that as a sample has images, or crops
    project             [B M C'] -> [B M C], the model's projector, in the precision of the rows that it is given
    """

    hidden: Tensor
    key: Tensor
    attention: Tensor
    earlier: Tensor
    patches: int
    project: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Site(Place):
    """A place with its tensors.

    hidden  [B N C]    the residual stream after the attention residual (round trips: what enters the attention)
    query   [B H N D]  as they enter q k^T, None where the method did not declare that it needs them
    key     [B G N D]  G <= H heads: grouped queries are not expanded
    value   [B G N D]
    size    [B N]      how many original tokens each row stands for, None while all are 1
    valid   [B N]      False for padding, None where nothing is masked
    mask    [B|1 1|H 1|N N] the attention's own mask, boolean or additive, or None
    causal             whether the attention is causal by its flag, without a mask
    scale              the factor on q k^T
    weights [B H N N]  the attention itself, where the model computes it anyway (eager attention), or None
    neurons [B N F]    what the last linear of the MLP before reads, the activated neurons
    prepared [B N]     what the method's `prepare` made of the tokens that entered layer 0
    inside  [B N]      True for the tokens of the visual span, exactly `span` of each sample, where `span` is not None
    spans              [B N] for each other span that the method needs, by name: True for its tokens; of "images" the
                       number of each token's image, -1 outside (tokred/registry/spans.py)
    earlier            the same tokens in the layer before the probed one: its query, key, mask and scale, or weights
    tower              the vision encoder behind the visual tokens, where it shows and all of them are still there
    """

    hidden: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    size: Tensor | None = None
    valid: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    scale: Any = None
    weights: Tensor | None = None
    inside: Tensor | None = None
    spans: Mapping[str, Tensor] = field(default_factory=dict)
    earlier: Site | None = None
    tower: Tower | None = None
    neurons: Tensor | None = None
    prepared: Tensor | None = None

    @property
    def batch(self) -> Any:
        return self.hidden.shape[0]

    def arange(self, start: Any, stop: Any, step: int = 1) -> Tensor:
        """Row numbers [B ..], the same for every sample."""
        return torch.arange(start, stop, step, device=self.hidden.device).expand(self.batch, -1)

    def sizes(self) -> Tensor:
        """[B N] how many original tokens each row stands for; padding stands for none."""
        return self.members() if self.size is None else self.size

    def members(self) -> Tensor:
        """[B N] one for each row, however many tokens it stands for; padding is none."""
        dtype = torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
        if self.valid is not None:
            return self.valid.to(dtype).expand(self.batch, -1)
        return torch.ones((self.batch, self.tokens), dtype=dtype, device=self.hidden.device)

    def metric(self) -> Tensor:
        """[B N D] the mean of the keys over heads, each row of length one (ToMe, section 3)."""
        assert self.key is not None
        mean = self.key.mean(1)
        length: Tensor = mean.norm(dim=-1, keepdim=True)
        return mean / length

    def attention(self, row: int = 0) -> Tensor:
        """[B H N] the attention of one query row, in float32 or better, masked and scaled as the model's own.

        A negative row counts from the end; -1 of a right-padded sample is its last token that is not padding.
        """
        if row < 0 and self.valid is not None:
            return self.attend(self.last(-row)).squeeze(2)
        row = row if row >= 0 else self.tokens + row
        if self.weights is not None:
            return precise(self.weights[:, :, row])
        assert self.query is not None
        mask = None if self.mask is None else self.mask[:, :, min(row, self.mask.shape[2] - 1)].unsqueeze(2)
        return self._softmax(self.query[:, :, row : row + 1], mask, self.arange(row, row + 1)).squeeze(2)

    def attend(self, rows: Tensor) -> Tensor:
        """[B H R N] the attention of query rows [B R], in float32 or better, masked and scaled as the model's own."""
        if self.weights is not None:
            index = rows[:, None, :, None].expand(-1, self.weights.shape[1], -1, self.tokens)
            return precise(self.weights.gather(2, index))
        assert self.query is not None
        heads, channels = self.query.shape[1], self.query.shape[-1]
        query = self.query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, channels))
        mask = self.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask.expand(self.batch, -1, -1, -1)
            mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        weights = self._softmax(query, mask, rows)
        if mask is not None and mask.dtype == torch.bool:  # padding may see nothing at all
            weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        return weights

    def flow(self, weight: Tensor, *, temperature: float = 1.0, steps: int = 1) -> Tensor:
        """[B H N] x^T A: how much of the rows' weights x, [B N] or [B H N], each key is given by the attention A.

        A is the model's own, in float32 or better, its scores divided by `temperature`; it is streamed in blocks of
        rows and never a matrix. `steps` of it: x^T A^steps. Rows that see nothing, padding, give nothing.
        """
        if self.weights is not None:
            attention = precise(self.weights)
            if temperature != 1.0:  # as softmax(log A / T) is softmax(scores / T)
                attention = (attention.log() / temperature).softmax(-1)
            if self.valid is not None:
                attention = attention * self.valid.unsqueeze(1).unsqueeze(-1)
            weight = weight if weight.dim() == 3 else weight.unsqueeze(1).expand(-1, attention.shape[1], -1)
            for _ in range(steps):
                weight = (weight.to(attention.dtype).unsqueeze(2) @ attention).squeeze(2)
            return weight
        assert self.query is not None and self.key is not None
        mask, causal = self.mask, self.causal and self.mask is None
        if self.size is not None and self.prop_attn:
            bias = self.size.clamp(min=1e-6).log()[:, None, None]
            mask = self._biased(bias)
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        weight = weight if weight.dim() == 3 else weight.unsqueeze(1).expand(-1, self.query.shape[1], -1)
        sums: Tensor = column_sums(self.query, self.key, weight, mask, causal, scale, temperature, steps)
        return sums

    def _biased(self, bias: Tensor) -> Tensor:
        """The mask with [B 1 1 N] added to the scores."""
        if self.mask is None:
            return bias
        return bias.masked_fill(~self.mask, -torch.inf) if self.mask.dtype == torch.bool else self.mask + bias

    def last(self, back: int = 1) -> Tensor:
        """[B 1] the row of the last token of each sample that is not padding, or of the one `back` - 1 before it."""
        if self.valid is None:
            return self.arange(self.tokens - back, self.tokens - back + 1)
        places = torch.arange(1, self.tokens + 1, device=self.hidden.device)
        return (self.valid * places).amax(-1, keepdim=True).expand(self.batch, -1) - back

    def _softmax(self, query: Tensor, mask: Tensor | None, rows: Tensor) -> Tensor:
        """[B H R D], [B|1 1|H R|1 N], [B R] -> [B H R N]; grouped keys are not expanded."""
        assert self.key is not None
        heads, count, channels = query.shape[1:]
        query = query.unflatten(1, (self.key.shape[1], -1)).flatten(2, 3)  # [B G H/G*R D]
        scale = channels**-0.5 if self.scale is None else self.scale
        scores = precise((query @ self.key.transpose(-1, -2)).reshape(self.batch, heads, count, -1) * scale)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        elif self.causal:
            later = torch.arange(self.tokens, device=rows.device) > rows.unsqueeze(-1)  # [B R N]
            scores = scores.masked_fill(later.unsqueeze(1), -torch.inf)
        if self.size is not None and self.prop_attn:
            scores = scores + self.size.clamp(min=1e-6).log()[:, None, None]
        return scores.softmax(-1)

    def candidates(self) -> Tensor:
        """[B N'] row numbers of the unprotected tokens, ascending."""
        if self.inside is None:
            return self.arange(self.head, self.tokens - self.tail)
        order = self.inside.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return order[:, : self.span]

    prop_attn: bool = False  # whether the model's own attention weighs keys by size at this site

    def text_rows(self) -> tuple[Tensor, Tensor]:
        """[B R] the rows of all tokens that are not visual, ascending, and which of them are the "instruction"."""
        _, rows = partition(self.candidates(), self.tokens)
        return rows, self.spans["instruction"].gather(1, rows)

    def keep_top(self, score: Tensor, count: Any) -> Keep:
        """Keep the `count` unprotected rows with the largest score [B N], in their order, and all protected ones."""
        if self.valid is not None:  # padding goes first
            score = score.masked_fill(~self.valid, -torch.inf)
        score = (
            score[:, self.head : self.tokens - self.tail] if self.inside is None else score.gather(1, self.candidates())
        )
        return self.keep_candidates(score.topk(count, dim=1).indices)

    def keep_candidates(self, chosen: Tensor) -> Keep:
        """Keep, in row order, the protected rows and those that `chosen` [B K] numbers among `candidates()`."""
        kept, gone = partition(chosen, self.free)
        if self.inside is not None:
            return Keep(partition(self.candidates().gather(1, gone), self.tokens)[1])
        return Keep(self.with_protected(kept + self.head))

    def with_protected(self, rows: Tensor) -> Tensor:
        """[B K'] row numbers of unprotected tokens -> [B K] with the head in front and the tail behind."""
        parts = [rows]
        if self.head:
            parts.insert(0, self.arange(0, self.head))
        if self.tail:
            parts.append(self.arange(self.tokens - self.tail, self.tokens))
        return torch.cat(parts, 1) if len(parts) > 1 else rows
