"""Merging image tokens with one another under causal attention: right where they are one piece, otherwise refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import tokred
from tests.decoders.models import IMAGE, LENGTH, SPAN, VLMS, build, prompts
from tokred import Merge, Reduction
from tokred.registry.maps import joined
from tokred.testing import check_method

pytestmark = pytest.mark.usefixtures("fresh")


@dataclass(frozen=True)
class Halves(Reduction):
    """Each image token of the first half joins one of the second half, in front of one layer."""

    layer: int = 0
    ratio: float = 0.5

    name: ClassVar[str] = "halves"
    needs = ("visual",)
    scope = "layer"
    merges = "visual"

    def default_layers(self, depth: int) -> list[int]:
        return [self.layer]

    def removed(self, place: Any) -> Any:
        return place.free // 2 if self.ratio else 0

    def plan(self, site: Any) -> Merge:
        half, rows = self.removed(site), site.candidates()
        return Merge.mean(*joined(rows[:, :half], rows[:, -half:], site.tokens), site.sizes())


class Careless(Halves):
    """The same, without saying what it merges."""

    merges = ""


def by_hand(model: Any, inputs: dict[str, Tensor], visual: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the model on embeddings that are merged before its first layer, and [B K] which rows are left."""
    embedded: list[Tensor] = []
    decoder = model.model.language_model if hasattr(model.model, "language_model") else model.model

    def keep_embeddings(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        embedded.append(
            kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else module.embed_tokens(kwargs["input_ids"])
        )

    handle = decoder.register_forward_pre_hook(keep_embeddings, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    merged, left = [], []
    for x, rows in zip(embedded[0], visual, strict=True):
        places = rows.nonzero().squeeze(-1).tolist()
        half = len(places) // 2
        x = x.clone()
        for early, late in zip(places[:half], places[-half:], strict=True):
            x[late] = (x[early] + x[late]) / 2
        left.append(torch.tensor([row for row in range(LENGTH) if row not in places[:half]]))
        merged.append(x[left[-1]])
    rows, short = torch.stack(left), {"inputs_embeds": torch.stack(merged)}
    short |= {name: inputs[name].gather(1, rows) for name in ("attention_mask", "position_ids") if name in inputs}
    short.setdefault("position_ids", rows)
    with torch.no_grad():
        return model.lm_head(decoder(**short).last_hidden_state), rows


@pytest.mark.slow
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ["llama", "llava", "internvl"])
def test_a_merged_prefill_is_the_model_on_merged_embeddings(name: str, padded: bool) -> None:
    inputs = prompts(model=name)
    if not padded:
        inputs = {key: value for key, value in inputs.items() if key not in ("attention_mask", "position_ids")}
    places = torch.arange(LENGTH).expand(3, -1)
    visual = inputs["input_ids"] == IMAGE if name in VLMS else (places >= SPAN[0]) & (places < SPAN[1])
    wanted, rows = by_hand(build(name, layers=3), inputs, visual)
    spans = {} if name in VLMS else {"spans": {"visual": SPAN}}
    with torch.no_grad():
        output = tokred.compile(build(name, layers=3), Halves(), lower="eager", **spans)(**inputs)
    for sample in range(3):
        left = [
            (i, row)
            for i, row in enumerate(rows[sample].tolist())
            if not padded or inputs["attention_mask"][sample, row]
        ]
        short, full = ([pair[i] for pair in left] for i in (0, 1))
        gap = (output.logits[sample, full] - wanted[sample, short]).abs().max()
        assert gap < 1e-9 * wanted.abs().max(), f"off by {gap}"
    assert [layer.rows.tolist() for layer in output.past_key_values.layers] == [rows.tolist()] * 3


@pytest.mark.slow
def test_image_tokens_in_two_pieces_are_an_error() -> None:
    inputs = prompts(2, model="llava")
    ids = inputs["input_ids"]
    first = int((ids[0] == IMAGE).nonzero()[0])
    ids[0, first + 16], ids[0, first + 8] = IMAGE, 5  # sixteen, with a word between them
    compiled = tokred.compile(build("llava", layers=3), Halves(layer=1), lower="eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match="text stands between the image tokens"):
        compiled(**inputs)


@pytest.mark.slow
def test_merging_anything_else_is_refused() -> None:
    compiled = tokred.compile(build("llava", layers=3), Careless(layer=1), lower="eager")
    with torch.no_grad():
        compiled(**prompts(model="llava"))
    codes = {b.refusal.code for graph in tokred.reports().graphs for b in graph.blocks if b.refusal and b.method}
    assert codes == {"causal"}


@pytest.mark.slow
def test_the_contract_holds_for_merging_among_image_tokens() -> None:
    check_method(Halves())


class MovesText(Halves):
    """A word goes to the image's place."""

    def plan(self, site: Any) -> Merge:
        half, rows = self.removed(site), site.candidates()
        text = (~site.inside).to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return Merge.mean(*joined(rows[:, -half:], text[:, :half], site.tokens), site.sizes())


class Shuffles(Halves):
    """Kept rows are not in their order."""

    def plan(self, site: Any) -> Merge:
        half, rows = self.removed(site), site.candidates()
        keep, src, into = joined(rows[:, :half], rows[:, -half:], site.tokens)
        return Merge.mean(keep.flip(1), src, keep.shape[1] - 1 - into, site.sizes())


@pytest.mark.parametrize(
    ("broken", "message"),
    [(MovesText, "rows outside the visual span are protected"), (Shuffles, "rows change their order")],
)
def test_the_contract_notices_what_is_not_merging_among_image_tokens(broken: type[Halves], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_method(broken())
