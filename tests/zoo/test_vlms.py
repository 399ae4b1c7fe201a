"""Vision-language models: what the table says of each, and dropped image tokens are keys that nobody sees any more."""

from __future__ import annotations

import json

import pytest
import torch

import tokred
from tests.decoders import oracle
from tests.zoo.architecture import Architecture
from tests.zoo.measure import Row, spans_of, summary
from tests.zoo.table import load_table
from tests.zoo.vlms import ARCHITECTURES, IMAGE

TABLE = load_table()

# Why rows are as they are without spans, where that is all the report can say.
REFUSED = {
    "idefics3": "how many image features are written into each sample shows only when it runs",
    "qwen2_vl": "no masked_scatter writes image features into this stream",
}


pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own, in Gemma 3's vmap
@pytest.mark.parametrize("architecture", [pytest.param(row, id=row.name) for row in ARCHITECTURES])
def test_dropping_image_tokens_is_masking_their_keys(architecture: Architecture) -> None:
    """In float64, exact passes included; what is not dropped is compiled unchanged, and the report says why."""
    expected, inputs = TABLE[architecture.name], architecture.example(dtype=torch.float64)
    plain, image = architecture.model(torch.float64), inputs["input_ids"] == IMAGE
    plain.set_attn_implementation({"text_config": "oracle"})  # type: ignore[operator]
    dropped = oracle.fastv(1, 0.5)(plain, inputs, image) if expected["reduced"] else {}
    with torch.no_grad(), oracle.masked(dropped):
        wanted = plain(**inputs, use_cache=False).logits

    options = {"lower": "eager", **spans_of(architecture)}
    with torch.no_grad():
        logits = tokred.compile(architecture.model(torch.float64), expected["recipe"], **options)(**inputs).logits
    left = ~dropped.get(1, torch.zeros_like(image))
    assert (logits - wanted)[left].abs().max() < 1e-9 * wanted.abs().max()

    report = tokred.reports()
    row = json.loads(json.dumps(summary(architecture, report, Row(expected["recipe"])).to_json()))
    for column in ("graphs", "attention", "mlp", "forms", "refusals", "restored", "reduced"):
        assert row[column] == expected[column], column
    refused = [b.refusal for g in report.graphs for b in g.blocks if b.refusal and b.refusal.code == "no-visual-span"]
    assert all(each.reason.startswith(REFUSED[architecture.name]) for each in refused)
    assert bool(refused) == (architecture.name in REFUSED) == (not expected["reduced"])
