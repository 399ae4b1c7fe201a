"""One recipe for both: the prefill drops tokens, the decoding skips neurons, against hooks and masked keys by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.decoders import oracle
from tests.decoders.models import LENGTH, SPAN, build, prompts
from tests.decoders.test_mask_oracle import reference, visual
from tests.passes.sparse_models import gates, masking
from tests.passes.test_skip_weights import limits_of, only_decoding

FASTV, CATS = "fastv(layer=2, keep=0.5)", "cats(sparsity=0.5)"


pytestmark = pytest.mark.usefixtures("fresh")


def generated(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Words [B 6] behind the prompts, and their logits."""
    asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    with torch.no_grad():
        done = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], return_dict_in_generate=True, **asked
        )
    return done.sequences[:, LENGTH:], torch.stack(done.logits, 1)


@pytest.mark.slow
def test_a_pruned_prefill_and_a_sparse_decoding() -> None:
    inputs, plain = prompts(3), reference("llama")
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    calibration = tokred.calibrate(build("llama"), [given], recipe=f"{FASTV} + {CATS}", progress=False)
    assert {site.values for site in calibration.sites} == {"gate"}
    limits, dropped = limits_of(calibration, "gate", 0.5), oracle.fastv(2, 0.5)(plain, inputs, visual("llama", inputs))
    with oracle.masked(dropped):
        pruned = generated(plain, inputs)
    with masking(gates(plain), only_decoding(limits), inputs=False):
        sparse = generated(plain, inputs)
        with oracle.masked(dropped):
            wanted = generated(plain, inputs)
    for one in (pruned, sparse):
        assert (one[1] - wanted[1])[:, 1].abs().max() > 1e-3 * wanted[1].abs().max()

    options: dict[str, Any] = {"spans": {"visual": SPAN}, "calibration": calibration, "strict": True, "lower": "eager"}
    got = generated(tokred.compile(build("llama"), f"{FASTV} + {CATS}", fullgraph=True, **options), inputs)
    assert torch.equal(got[0], wanted[0])
    assert (got[1] - wanted[1]).abs().max() < 1e-9 * wanted[1].abs().max()
    prefill, first, *rest = tokred.reports().graphs
    left = LENGTH - (SPAN[1] - SPAN[0]) // 2
    (cut,) = [block for block in prefill.blocks if block.kind == "attention" and block.tokens == (LENGTH, left)][:1]
    assert cut.method is not None and cut.method.startswith("fastv")
    for graph in (first, *rest):
        mlps = [block for block in graph.blocks if block.kind == "mlp"]
        assert all(row.method and row.method.startswith("cats") and row.refusal is None for row in mlps)
        assert all(row.flops[1] < 0.75 * row.flops[0] for row in mlps)
    assert not [row for row in prefill.blocks if row.kind == "mlp" and row.refusal is None and row.method]
