"""The oracle: dropping rows at a layer is masking those keys in this layer and all later ones, in eager transformers.

Nothing here knows tokred. Attention is written out, selections are written out
from the papers' released code, one sample at a time where that is how they are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

__all__ = [
    "Selection",
    "adaptinfer",
    "attention_of",
    "compact",
    "corematching",
    "decoder_layers",
    "embeddings",
    "fastv",
    "generate",
    "hidrop",
    "late",
    "masked",
    "mixture_of_depths",
    "pyramiddrop",
    "sparsevlm",
]

Dropped = dict[int, Tensor]  # layer -> [B N], True where a prompt token is gone from this layer on


_dropped: Dropped = {}
_weights: dict[int, Tensor] = {}
_late: list[tuple[Tensor, int]] = []
_around: dict[int, Tensor] = {}  # layer -> [B N], True where a prompt token goes around this one layer


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as a textbook has it, in the precision of its inputs; [B H N D] -> [B N H D] and the weights."""
    heads, length, total = query.shape[1], query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    seen = (
        torch.ones(length, total, dtype=torch.bool).tril(total - length) if attention_mask is None else attention_mask
    )
    for first, gone in _dropped.items():
        if first <= module.layer_idx:
            seen = seen & ~nn.functional.pad(gone, (0, total - gone.shape[1]))[:, None, None]
    for hidden, enter in _late:
        if module.layer_idx < enter:
            seen = seen & ~nn.functional.pad(hidden, (0, total - hidden.shape[1]))[:, None, None]
    if module.layer_idx in _around:
        gone = _around[module.layer_idx]
        seen = seen & ~nn.functional.pad(gone, (0, total - gone.shape[1]))[:, None, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)  # padding sees nothing
    _weights[module.layer_idx] = weights
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("oracle", _attention)
AttentionMaskInterface.register("oracle", sdpa_mask)


@contextmanager
def masked(dropped: Dropped) -> Iterator[None]:
    """Inside, no query of a layer sees the keys that are dropped in it or in an earlier one."""
    _dropped.update(dropped)
    try:
        yield
    finally:
        _dropped.clear()


@contextmanager
def compact(model: nn.Module) -> Iterator[None]:
    """Inside, each layer turns queries and keys by the numbers 0, 1, 2, ... of the tokens that are left in it."""

    def renumber(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places = kwargs["position_ids"].clone()
        for first, gone in _dropped.items():
            if first <= module.self_attn.layer_idx:
                places -= nn.functional.pad(gone, (0, places.shape[1] - gone.shape[1])).cumsum(1)
        return args, {**kwargs, "position_embeddings": model.model.rotary_emb(args[0], places)}  # type: ignore

    handles = [layer.register_forward_pre_hook(renumber, with_kwargs=True) for layer in decoder_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_of(model: nn.Module, inputs: dict[str, Tensor], layer: int, dropped: Dropped) -> Tensor:
    """[B H N N] the attention weights of one layer."""
    with torch.no_grad(), masked(dropped):
        model(**inputs, use_cache=False)
    return _weights[layer]


Selection = Callable[[nn.Module, dict[str, Tensor], Tensor], Dropped]  # model, inputs, [B N] visual -> what is dropped


def _all_but_top(score: Tensor, candidates: Tensor, count: int) -> Tensor:
    """[B N] the candidates that are not among the `count` of each sample with the highest score."""
    gone = candidates.clone()
    for sample in range(len(score)):
        places = candidates[sample].nonzero().squeeze(-1)
        best = score[sample, places].topk(count).indices
        gone[sample, places[best]] = False
    return gone


def fastv(layer: int, keep: float) -> Selection:
    """pkunlp-icler/FastV: the last row of layer - 1's attention, mean over heads, the top of the image's tokens."""

    def select(model: nn.Module, inputs: dict[str, Tensor], visual: Tensor) -> Dropped:
        score = attention_of(model, inputs, layer - 1, {})[:, :, -1].mean(1)
        return {layer: _all_but_top(score, visual, round(keep * int(visual[0].sum())))}

    return select


def pyramiddrop(layers: list[int], keep: float) -> Selection:
    """Cooperx521/PyramidDrop: at each layer, the last row of its own attention over the tokens that enter it."""

    def select(model: nn.Module, inputs: dict[str, Tensor], visual: Tensor) -> Dropped:
        dropped: Dropped = {}
        left, first = visual.clone(), int(visual[0].sum())
        for stage, layer in enumerate(layers, 1):
            score = attention_of(model, inputs, layer, dropped)[:, :, -1].mean(1)
            dropped[layer] = _all_but_top(score, left, round(keep**stage * first))
            left = left & ~dropped[layer]
        return dropped

    return select


def adaptinfer(layers: list[int], shares: list[float]) -> Selection:
    """weiczh02/AdaptInfer: per head, text-to-text attention weighs the text rows of the text-to-image attention."""

    def select(model: nn.Module, inputs: dict[str, Tensor], visual: Tensor) -> Dropped:
        dropped: Dropped = {}
        left, first = visual.clone(), int(visual[0].sum())
        for layer, share in zip(layers, shares, strict=True):
            attention = attention_of(model, inputs, layer - 1, dropped)
            score = torch.zeros(left.shape, dtype=attention.dtype)
            for sample in range(len(left)):
                text = list(range(int(visual[sample].nonzero().max()) + 1, left.shape[1]))
                for head in attention[sample]:
                    inner = head[text][:, text]
                    both = inner + inner.T - inner.diag().diag()
                    score[sample] += both.sum(0) @ head[text]
            dropped[layer] = _all_but_top(score, left, round(share * first))
            left = left & ~dropped[layer]
        return dropped

    return select


def sparsevlm(layers: list[int], shares: list[float]) -> Selection:
    """Gumpest/SparseVLMs: words that look more like the image than the mean word does rate, by attention."""

    def select(model: nn.Module, inputs: dict[str, Tensor], visual: Tensor) -> Dropped:
        entering = embeddings(model, inputs)
        raters = []
        for sample, x in enumerate(entering):
            places = visual[sample].nonzero().squeeze(-1)
            text = torch.arange(int(places.max()) + 1, visual.shape[1])
            share = (x[places] @ x[text].T).softmax(-1).mean(0)
            raters.append(text[share > share.mean()])
            assert 0 < len(raters[-1]) < len(text)
        dropped: Dropped = {}
        left, first = visual.clone(), int(visual[0].sum())
        for layer, share in zip(layers, shares, strict=True):
            attention = attention_of(model, inputs, layer - 1, dropped).mean(1)
            score = torch.stack([each[rows].mean(0) for each, rows in zip(attention, raters, strict=True)])
            dropped[layer] = _all_but_top(score, left, round(share * first))
            left = left & ~dropped[layer]
        return dropped

    return select


def hidrop(layers: list[int], shares: list[float]) -> Selection:
    """The paper's section 3, behind the injection: the last row of the layer's own attention. Run inside `late`."""

    def select(model: nn.Module, inputs: dict[str, Tensor], visual: Tensor) -> Dropped:
        dropped: Dropped = {}
        left, first = visual.clone(), int(visual[0].sum())
        for layer, share in zip(layers, shares, strict=True):
            score = attention_of(model, inputs, layer, dropped)[:, :, -1].mean(1)
            dropped[layer] = _all_but_top(score, left, round(share * first))
            left = left & ~dropped[layer]
        return dropped

    return select


def embeddings(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[B N C] what enters the first layer."""
    found: list[Tensor] = []
    handle = decoder_layers(model)[0].register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    handle.remove()
    return found[0]


def decoder_layers(model: Any) -> Any:
    """The language model's blocks."""
    if hasattr(model, "transformer"):
        return model.transformer.h
    return getattr(model.model, "language_model", model.model).layers


@contextmanager
def late(model: Any, visual: Tensor, enter: int) -> Iterator[None]:
    """Inside, the layers before `enter` neither show the image's keys to anyone nor change its rows."""

    def hold(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        rows = nn.functional.pad(visual, (0, args[0].shape[1] - visual.shape[1])).unsqueeze(-1)
        if isinstance(output, tuple):
            return (torch.where(rows, args[0], output[0]), *output[1:])
        return torch.where(rows, args[0], output)

    handles = [layer.register_forward_hook(hold) for layer in decoder_layers(model)[:enter]]
    _late.append((visual, enter))
    try:
        yield
    finally:
        _late.pop()
        for handle in handles:
            handle.remove()


def corematching(layer: int, keep: float, core: float) -> Selection:
    """arXiv 2505.19235: the neurons that are positive for most of a sample's tokens, and which tokens have them."""

    def select(model: nn.Module, inputs: dict[str, Tensor], visual: Tensor) -> Dropped:
        found: list[Tensor] = []
        mlp = decoder_layers(model)[layer - 1].mlp
        down = next(getattr(mlp, name) for name in ("down_proj", "c_proj", "fc2") if hasattr(mlp, name))
        handle = down.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        with torch.no_grad():
            model(**inputs, use_cache=False)
        handle.remove()
        score = torch.zeros(visual.shape)
        for sample, neurons in enumerate(found[0]):
            fires = neurons > 0
            often = fires[inputs["attention_mask"][sample].bool()].sum(0).tolist()
            ranked = sorted(range(len(often)), key=lambda neuron: (-often[neuron], neuron))
            score[sample] = fires[:, ranked[: math.ceil(core * len(often))]].sum(-1)
            score[sample] -= 0.001 * torch.arange(len(fires))  # the first of equal ones
        return {layer: _all_but_top(score, visual, round(keep * int(visual[0].sum())))}

    return select


@contextmanager
def mixture_of_depths(
    model: Any, visual: Tensor, counts: dict[int, int], routers: dict[str, Tensor], gain: float
) -> Iterator[dict[int, list[list[int]]]]:
    """arXiv 2412.04449: inside, a few of the image's tokens go through each of these layers, by their routers.

    Full length throughout: those that go around a layer are keys that nobody sees there, and leave it as they entered,
    times their weights. Yields, by layer, the rows of each sample that went through.
    """
    through: dict[int, list[list[int]]] = {}
    weights: dict[int, Tensor] = {}

    def enter(layer: int, x: Tensor) -> None:
        weights[layer], _around[layer] = torch.ones(x.shape[:2], dtype=x.dtype), visual.clone()
        through[layer] = []
        for sample in range(len(x)):
            rows = visual[sample].nonzero().squeeze(-1).tolist()
            weight, bias = (routers[f"layers.{layer}.router.{part}"].flatten() for part in ("weight", "bias"))
            logits = {row: float((weight * x[sample, row]).sum() + bias) for row in rows}
            chosen = sorted(rows, key=lambda row: -logits[row])[: counts[layer]]
            for row in rows:
                weights[layer][sample, row] = 1 + gain * math.tanh(logits[row])
            _around[layer][sample, chosen] = False
            through[layer].append((~_around[layer][sample]).nonzero().squeeze(-1).tolist())

    def leave(layer: int, entered: Tensor, left: Any) -> Any:
        whole = left[0] if isinstance(left, tuple) else left
        gone = nn.functional.pad(_around[layer], (0, whole.shape[1] - visual.shape[1])).unsqueeze(-1)
        whole = torch.where(gone, entered * weights[layer].unsqueeze(-1), whole)
        return (whole, *left[1:]) if isinstance(left, tuple) else whole

    handles = []
    for number, layer in enumerate(decoder_layers(model)):
        if number in counts:
            added = next(getattr(layer, name) for name in ("post_feedforward_layernorm", "mlp") if hasattr(layer, name))
            handles += [
                layer.register_forward_pre_hook(lambda m, args, n=number: enter(n, args[0])),
                layer.register_forward_hook(lambda m, args, output, n=number: leave(n, args[0], output)),
                added.register_forward_hook(lambda m, args, output, n=number: output * weights[n].unsqueeze(-1)),
            ]
    try:
        yield through
    finally:
        _around.clear()
        for handle in handles:
            handle.remove()


def generate(model: nn.Module, inputs: dict[str, Tensor], dropped: Dropped, steps: int) -> Tensor:
    """[B steps] greedy tokens; every step runs the whole sequence again, without a cache."""
    ids, mask, positions = inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"]
    image = {name: value for name, value in inputs.items() if name == "pixel_values"}
    new: list[Tensor] = []
    for _ in range(steps):
        with torch.no_grad(), masked(dropped):
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **image).logits
        new.append(logits[:, -1, :98].argmax(-1))  # 98 would be one more image token
        ids = torch.cat([ids, new[-1][:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    return torch.stack(new, 1)
