"""core_neurons against the same thing written by hand: hooks on the eager model, which decodes with the prompt's set."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from tests.passes.sparse_models import MODELS, example, linears, made
from tokred.errors import ArgumentError
from tokred.registry.recipe import parse_recipe

EXACT = 1e-9  # relative to the logits, in float64
DECODERS = ["llama", "mistral", "qwen3", "gemma3", "phi3", "gpt2", "opt"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    tokred.reset()
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def core_of(rows: list[Tensor], keep: float, token_keep: float) -> set[int]:
    """The definition, one token and one neuron after the other."""
    counts = [0] * len(rows[0])
    for row in rows:
        values = row.tolist()
        positive = sorted((i for i, value in enumerate(values) if value > 0), key=lambda i: -values[i])
        for neuron in positive[: ceil(token_keep * len(positive) - 1e-9)]:
            counts[neuron] += 1
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    return set(order[: max(round(keep * len(counts)), 1)])


def lasts(model: nn.Module) -> dict[str, nn.Module]:
    """The last linear of each MLP."""
    ends = ("down_proj.weight", "mlp.c_proj.weight", "fc2.weight", "output.dense.weight")
    found = {name: module for name, module in linears(model).items() if name.endswith(ends)}
    return {name: module for name, module in found.items() if "attention.output" not in name}


@contextmanager
def by_hand(model: nn.Module, real: Callable[[], Tensor | None], keep: float, token_keep: float, whole: bool = False) -> Iterator[dict[str, set[int]]]:
    """Inside, each MLP of the eager model decodes with what the last prompt chose; `whole`: computes that so as well.

    real   which rows of a prompt [B N] are no padding, None for all
    """
    chosen: dict[str, set[int]] = {}

    def hook(name: str, x: Tensor) -> Tensor:
        tokens = x.shape[-2] if x.dim() == 3 else x.shape[0] // max(int(real().shape[0]), 1)
        if tokens > 1 or whole:
            rows = x.reshape(-1, x.shape[-1])
            mask = real()
            rows = rows if mask is None else rows[mask.flatten().bool()]
            chosen[name] = core_of(list(rows), keep, token_keep)
            if not whole:
                return x
        kept = torch.zeros(x.shape[-1], dtype=x.dtype)
        kept[sorted(chosen[name])] = 1
        return x * kept

    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: (hook(name, args[0]),))
        for name, module in lasts(model).items()
    ]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def padded(name: str) -> dict[str, Tensor]:
    """Three prompts of 9, 6 and 4 tokens, padded on the left."""
    ids = torch.cat([example(name), example(name, 5)[:1]])
    mask = (torch.arange(9) >= torch.tensor([[0], [3], [5]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def generated(model: Any, inputs: dict[str, Tensor], tokens: int = 16, **options: Any) -> tuple[Tensor, Tensor]:
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **options}
    with torch.no_grad():
        done = model.generate(**inputs, max_new_tokens=tokens, **options)
    return done.sequences, torch.stack(done.logits, 1)


def fast(model: Any, recipe: str = "core_neurons(layers=':')", **options: Any) -> Any:
    return tokred.compile(model, recipe, fullgraph=True, **{"strict": True, "lower": "eager", **options})


def close(got: Any, wanted: Any, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float = EXACT) -> None:
    assert torch.equal(got[0], wanted[0])
    close(got[1], wanted[1], tolerance)


@pytest.mark.parametrize("name", DECODERS)
def test_a_padded_batch_decodes_with_what_its_prompts_chose(name: str) -> None:
    model, inputs = made(name), padded(name)
    dense = generated(model, inputs)
    with by_hand(model, lambda: inputs["attention_mask"], 0.4, 0.2) as chosen:
        wanted = generated(model, inputs)
    assert (dense[1] - wanted[1])[:, 1:].abs().max() > 1e-2 * wanted[1].abs().max()
    same(generated(fast(model), inputs), wanted)
    graphs = tokred.reports().graphs
    assert len(graphs) == 3  # the prompt, the first token, tokens behind a cache of run-time length: as without a recipe
    rows = [[row for row in graph.blocks if row.kind == "mlp"] for graph in graphs]
    assert all(row.method and not row.refusal for row in rows[0] + rows[1] + rows[2])
    assert all(row.flops[0] == row.flops[1] for row in rows[0]) and "all are computed" in rows[0][0].note
    assert all(row.flops[1] < 0.45 * row.flops[0] and "by masking" not in row.note for row in rows[1] + rows[2])
    assert len(chosen) == 2 and any("gathered behind it" in note for note in graphs[1].notes)
