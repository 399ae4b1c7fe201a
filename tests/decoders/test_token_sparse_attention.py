"""Token Sparse Attention in real decoders: prefill, caches and generation are those of a reference in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import tokred
from tests.decoders import oracle
from tests.decoders.models import DECODERS, LENGTH, SPAN, VLMS, build, prompts
from tests.reference.token_sparse import token_sparse

OPTIONS: dict[str, Any] = {"coverage": 0.3, "window": 4, "least": 5, "kernel": 3}
RECIPE = f"token_sparse_attention({', '.join(f'{name}={value}' for name, value in OPTIONS.items())})"

_layers: set[int] = set()
_valid: list[Tensor] = []


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The reference in the prefill of the chosen layers, a textbook's attention everywhere else."""
    if module.layer_idx not in _layers or query.shape[2] != key.shape[2]:
        return oracle._attention(module, query, key, value, attention_mask, **options)[0], None
    attended = token_sparse(query, key, value, _valid[0], scale=options.get("scaling"), **OPTIONS)
    return attended.transpose(1, 2), None


AttentionInterface.register("token_sparse_reference", _attention)
AttentionMaskInterface.register("token_sparse_reference", sdpa_mask)


@contextmanager
def reference(name: str, layers: set[int], valid: Tensor) -> Iterator[nn.Module]:
    """The model with the reference in it."""
    model = build(name, layers=3)
    kind = "token_sparse_reference"
    model.set_attn_implementation({"text_config": kind} if name in VLMS else kind)
    _layers.update(layers)
    _valid.append(valid)
    try:
        yield model
    finally:
        _layers.clear()
        _valid.clear()


pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DECODERS, "llava"])
def test_a_prefill_is_the_reference_s_and_its_caches_are_whole(name: str) -> None:
    inputs = prompts(model=name)
    real = inputs["attention_mask"].bool()
    with torch.no_grad(), reference(name, {1, 2}, real) as plain:
        wanted = plain(**inputs, use_cache=False).logits
    model = tokred.compile(build(name, layers=3), RECIPE, lower="eager")
    with torch.no_grad():
        output = model(**inputs)
        unlike = build(name, layers=3)(**inputs, use_cache=False).logits
    assert (output.logits - wanted)[real].abs().max() < 1e-9 * wanted.abs().max()
    assert (unlike - wanted)[real].abs().max() > 1e-3 * wanted.abs().max(), "the reference leaves nothing out"
    assert all(layer.keys.shape[2] == LENGTH for layer in output.past_key_values.layers)


@pytest.mark.slow
def test_generation_goes_on_densely_from_whole_caches() -> None:
    """generate() reads one row of the last layer in the prefill, which therefore stays dense."""
    inputs = prompts(3, model="llama")
    given = {key: value for key, value in inputs.items() if key != "position_ids"}
    how = {"do_sample": False, "max_new_tokens": 12}
    with torch.no_grad(), reference("llama", {1}, inputs["attention_mask"].bool()) as plain:
        wanted = plain.generate(**given, **how)  # type: ignore[operator]
    model = tokred.compile(build("llama", layers=3), RECIPE, lower="eager", strict=True)
    new = model.generate(**given, **how)
    assert new.tolist() == wanted.tolist()
    assert new.tolist() != build("llama", layers=3).generate(**given, **how).tolist(), "dense attention says the same"


@pytest.mark.slow
def test_behind_fastv_the_rows_that_are_left_choose() -> None:
    """What fastv keeps is the sequence that token_sparse_attention sees: to the reference the rest is padding."""
    inputs = prompts(model="llama")
    real = inputs["attention_mask"].bool()
    model = tokred.compile(
        build("llama", layers=3), f"fastv(layer=1, keep=0.5) + {RECIPE}", lower="eager", spans={"visual": SPAN}
    )
    with torch.no_grad():
        output = model(**inputs)
    kept = output.past_key_values.layers[1].rows
    acted = [row for row in tokred.reports().graphs[0].blocks if row.kind == "attention" and row.method]
    assert [row.layer for row in acted] == [1, 2]
    assert acted[0].method == f"fastv(layer=1, keep=0.5) + {acted[1].method}"
    assert acted[0].tokens == (LENGTH, kept.shape[1])
    valid = real & torch.zeros_like(real).scatter(1, kept, True)
    with torch.no_grad(), reference("llama", {1, 2}, valid) as plain:
        wanted = plain(**inputs, use_cache=False).logits
    assert (output.logits - wanted)[valid].abs().max() < 1e-9 * wanted.abs().max()
