"""Prompts of many lengths: after the second one no prefill is compiled again, and each drops what it would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokred
from tests.decoders.models import IMAGE, LENGTH, SPAN, VLMS, build, prompts

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "given"), [("llama", SPAN), ("llama", IMAGE), ("llava", None)])
def test_a_new_prompt_length_compiles_once_more_and_then_never(name: str, given: Any) -> None:
    model, options = build(name, layers=3), {"spans": {} if given is None else {"visual": given}}
    fast = tokred.compile(model, "fastv(layer=1, keep=0.5)", lower="eager", **options)
    for length in (LENGTH, LENGTH + 7, LENGTH + 16):
        ids = torch.randint(3, IMAGE, (2, length), generator=torch.Generator().manual_seed(length))
        inputs = prompts(2, model="llava")
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
        used = ("input_ids", "pixel_values") if name in VLMS else ("input_ids",)
        inputs = {key: value for key, value in inputs.items() if key in used}
        with torch.no_grad():
            output = fast(**inputs)
    acted = [block for graph in tokred.reports().graphs for block in graph.blocks if block.method]
    assert len(acted) == 2 and not any(block.refusal for block in acted)
    torch.compiler.reset()  # the last length is one that nothing was compiled for
    alone = tokred.compile(model, "fastv(layer=1, keep=0.5)", lower="eager", dynamic=False, **options)
    with torch.no_grad():
        expected = alone(**inputs)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-10, atol=1e-10)
    rows = [[layer.rows.tolist() for layer in each.past_key_values.layers[1:]] for each in (output, expected)]
    assert rows[0] == rows[1]
