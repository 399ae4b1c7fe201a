"""Every method for neurons, tokens and attention on the language models: perplexity, recall, work left out, speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

import tokred
from tokred.bench import interleaved
from tokred.demo.language import model as text
from tokred.demo.language import recall as associative
from tokred.demo.language.data import corpus, windows
from tokred.demo.language.recall import CONTEXT, Pairs
from tokred.demo.language.score import perplexity
from tokred.registry.recipe import parse_recipe

__all__ = ["BY_HAND", "LEVELS", "RECIPES", "Row", "by_hand", "recipes", "score", "time_against_dense"]

LEVELS = (30, 50, 70, 90)  # per cent left out: of an MLP's neurons, or of the context's tokens
DENSE = "the model as it is"
BATCH, SAMPLE = 8, 128  # windows in a call, and windows that are scored
PROMPT, WORDS = 64, 32  # tokens read and generated for the speed
MASKED = ", phase='masked'"
SPANS = {"visual": (0, CONTEXT)}  # for methods that drop image tokens the context is the image

# {left} is the share left out, {keep} what stays. Those for neurons say so of every MLP, on whole texts ("masked").
NEURONS = {
    "cats": (f"cats(sparsity={{left}}{MASKED})",),
    "teal": (f"teal(sparsity={{left}}{MASKED})", f"teal(sparsity={{left}}, allocation='greedy'{MASKED})"),
    "moefy": (f"moefy(sparsity={{left}}{MASKED})",),
    "core_neurons": (f"core_neurons(keep={{keep}}, layers='*'{MASKED})",),
}
# What drops or merges tokens is asked for recall alone: a perplexity would be that of tokens whose successors chose
# who is read, and those that were dropped would have none of their own. Each cuts in front of layer 1 of the two.
TOKENS = {
    "random": ("random(keep={keep}, layers=[0])",),
    "norm": ("norm(keep={keep}, layers=[0])",),
    "fastv": ("fastv(layer=1, keep={keep})",),
    "corematching": ("corematching(layer=1, keep={keep})",),
    "zoo_prune": ("zoo_prune(keep={keep})",),
    "pool": ("pool(keep={keep}, layers=[0])",),
    # the share left out of the attention is what `coverage` makes it; the questions are its window
    "token_sparse_attention": ("token_sparse_attention(coverage={left}, window=24, least=6)",),
}
RECIPES = NEURONS | TOKENS


@dataclass(frozen=True)
class Row:
    """One line of the table.

    level     per cent that the recipe asks to leave out
    left_out  per cent of products of a neuron and a token that the MLPs' last linear layers did not need to compute,
              because the neuron is zero or the token gone: in the text if it was read, else in the recall task
    speed     tokens a second of generate(), batch 1, and `dense` those of the model under Inductor
    """

    method: str
    level: int
    recipe: str
    activation: str = "silu"
    perplexity: float | None = None
    recall: float | None = None
    left_out: float | None = None
    speed: float | None = None
    dense: float | None = None

    @property
    def key(self) -> str:
        return f"{self.activation}: {self.recipe}"


# --- written by hand, with hooks ----------------------------------------------------------------------------------


def _best(score: Tensor, share: float) -> Tensor:
    """Which of the last axis [.. F] have the highest scores, all but `share`: 1 or 0."""
    kept = score.shape[-1] - round(share * score.shape[-1])
    return torch.zeros_like(score).scatter_(-1, score.topk(kept, dim=-1).indices, 1.0)


def _random(share: float, values: Tensor, generator: torch.Generator) -> Tensor:
    return values * _best(torch.rand(values.shape, generator=generator), share)


def _largest(share: float, values: Tensor, generator: torch.Generator) -> Tensor:
    return values * _best(values.abs(), share)


# Where each is hooked, and what it does to the values [B N F] there.
BY_HAND: dict[str, tuple[str, Callable[[float, Tensor, torch.Generator], Tensor]]] = {
    "random neurons": ("down_proj", _random),
    "largest gates": ("act_fn", _largest),  # what CATS's thresholds are after, with each token's own count
    "largest neurons": ("down_proj", _largest),  # no choice that sees one neuron at a time is better
}


@contextmanager
def by_hand(model: Any, name: str, share: float) -> Iterator[None]:
    """Inside, each MLP leaves `share` of its neurons out for each token, chosen as `BY_HAND[name]` says."""
    place, choose = BY_HAND[name]
    generator = torch.Generator().manual_seed(0)

    def before(module: Any, inputs: tuple[Tensor]) -> Tensor:
        return choose(share, inputs[0], generator)

    def behind(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return choose(share, output, generator)

    handles = []
    for layer in model.model.layers:
        module = getattr(layer.mlp, place)
        hook = module.register_forward_hook(behind) if place == "act_fn" else module.register_forward_pre_hook(before)
        handles.append(hook)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- scores -------------------------------------------------------------------------------------------------------


class LeftOut(TorchDispatchMode):
    """Counts the neurons that are not zero where a matrix product reads them and one of the MLPs' last weights."""

    def __init__(self, model: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = {layer.mlp.down_proj.weight.data_ptr() for layer in model.model.layers}
        self.computed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[1].data_ptr() in self.weights:
            self.computed += int((args[0] != 0).sum())
        return func(*args, **(kwargs or {}))


@contextmanager
def _runnable(model: Any, row: Row, counter: LeftOut) -> Iterator[Any]:
    """What to call in `model`'s place for a row. A recipe's graph is run node by node: nothing is generated."""
    if row.method in BY_HAND:
        with by_hand(model, row.method, row.level / 100), counter:
            yield model
    elif row.method == "dense":
        with counter:
            yield model
    else:
        from tokred.generation import with_pruned_caches

        options = _options(model, row) | {"lower": "eager"}

        def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            run = tokred.backend(graph, inputs, options=options)

            def counted(*args: Any) -> Any:
                with counter:  # around the call to the compiled model, Dynamo would compile nothing
                    return run(*args)

            return counted

        torch._dynamo.reset()
        yield with_pruned_caches(model, lambda forward: torch.compile(forward, backend=backend, dynamic=False))


def _options(model: Any, row: Row) -> dict[str, Any]:
    options: dict[str, Any] = {"recipe": row.recipe, "strict": True}
    if row.method in TOKENS:
        options["spans"] = SPANS
    if any(getattr(method, "calibrated", False) for method in parse_recipe(row.recipe).methods):
        options["calibration"] = calibration(model, "greedy" if "greedy" in row.recipe else "")
    return options


@cache
def calibration(model: Any, allocation: str = "", number: int = 32) -> Any:
    """What `tokred.calibrate` finds in training text, or in sequences of pairs: one serves every recipe and share."""
    recipe = "teal(allocation='greedy')" if allocation else None
    number = number // 4 if allocation else number  # each layer runs hundreds of times on these
    if model.config.vocab_size == text.CONFIG["vocab_size"]:
        ids = windows(corpus(held_out=False).tokens(), number, text.WINDOW)[:, :-1]
    else:
        ids = associative.pairs(4 * number, seed=3).input_ids
    return tokred.calibrate(model, [{"input_ids": each} for each in ids.split(BATCH)], recipe=recipe)


def score(models: dict[str, Any], tokens: Tensor, data: Pairs, row: Row) -> Row:
    """`row` with its perplexity, recall and what was left out. `models`: "silu", "relu" and "recall"."""
    found: dict[str, Any] = {}
    if row.activation == "silu":
        model = models["recall"]
        counter = LeftOut(model)
        with _runnable(model, row, counter) as function:
            found["recall"] = associative.recall(function, data)
        found["left_out"] = 1 - counter.computed / _neurons(model, data.input_ids.numel())
    if row.method not in TOKENS:
        model = models[row.activation]
        counter = LeftOut(model)
        with _runnable(model, row, counter) as function:
            found["perplexity"] = perplexity(function, tokens, BATCH, text.WINDOW, SAMPLE)
        found["left_out"] = 1 - counter.computed / _neurons(model, SAMPLE * text.WINDOW)
    return replace(row, **found)


def _neurons(model: Any, tokens: int) -> int:
    return int(tokens * model.config.num_hidden_layers * model.config.intermediate_size)


@torch.no_grad()
def time_against_dense(model: Any, prompt: Tensor, row: Row, rounds: int) -> Row:
    """`row` with tokens a second: `WORDS` words behind `prompt` [1 N], in turn with the model under Inductor.

    Only for recipes that say something about neurons; they are asked for in the decoding's form, not masked.
    """
    from tokred.generation import with_pruned_caches

    def generate(function: Any) -> Any:
        return function.generate(prompt, do_sample=False, min_new_tokens=WORDS, max_new_tokens=WORDS)

    torch._dynamo.reset()
    options = _options(model, row) if row.method in NEURONS else {"recipe": None}
    recipe = options.pop("recipe")
    fast = tokred.compile(model, recipe and recipe.replace(MASKED, ""), **options)
    dense = with_pruned_caches(model, lambda forward: torch.compile(forward, backend="inductor"))
    seconds = interleaved({"dense": partial(generate, dense), "fast": partial(generate, fast)}, rounds)
    return replace(row, speed=WORDS / seconds["fast"], dense=WORDS / seconds["dense"])


def recipes(levels: Sequence[int] = LEVELS) -> list[Row]:
    """What to measure: the models as they are, then level by level what is written by hand and what is registered."""
    registered = tokred.methods()
    rows = [Row("dense", 0, DENSE, activation) for activation in text.ACTIVATIONS]
    for level in levels:
        rows += [Row(name, level, f"by hand: {name}, {level} % left out") for name in BY_HAND]
        for name, each in RECIPES.items():
            if name in registered:
                numbers = {"left": level / 100, "keep": round(1 - level / 100, 2)}
                rows += [Row(name, level, recipe.format(**numbers)) for recipe in each]
    return rows


HEADINGS = ("perplexity", "recall", "left out", "tokens/s", "x inductor")


def cells(row: Row) -> Iterator[str]:
    """What stands under `HEADINGS`; empty where it was not measured."""
    yield "" if row.perplexity is None else f"{row.perplexity:.2f}"
    yield "" if row.recall is None else f"{row.recall:.1%}"
    yield "" if row.left_out is None else f"{row.left_out:.0%}"
    yield "" if row.speed is None else f"{row.speed:.0f}"
    yield "" if row.speed is None or row.dense is None else f"{row.speed / row.dense:.2f}x"
