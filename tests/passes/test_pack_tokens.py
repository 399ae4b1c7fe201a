"""Padded batches on their real rows alone: the same results, and where rows of padding are read, the same graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from tests.passes import padded_models as models
from tests.passes.padded_models import WORDS, Encoder
from tests.zoo.architectures import ARCHITECTURES
from tokred.compiler import padded
from tokred.compiler.machine import Machine
from tokred.passes import pack_tokens

LENGTHS = (7, 3, 1)
POOLS = [models.mean, models.first, models.last_valid, models.largest, models.largest_where, models.rows_and_mean]


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of a packed graph ran on; small models are packed as if that paid."""
    torch._dynamo.reset()
    tokred.reset()
    rows: list[int] = []
    original = padded.by_padding

    def spied(real: Any, packed: Any, dense: Any, worth: float) -> Any:
        def noting() -> Any:
            compiled = packed()

            def call(*inputs: Any) -> Any:
                rows.append(inputs[-3].shape[0])
                return compiled(*inputs)

            return call

        return original(real, noting, dense, worth)

    monkeypatch.setattr(padded, "by_padding", spied)
    monkeypatch.setattr(pack_tokens, "share_that_pays", lambda *_: 0.01)
    return rows


def batch(lengths: tuple[int, ...] = LENGTHS, tokens: int = 8, left: bool = False) -> tuple[Tensor, Tensor]:
    """Ids, and which of them are real (int64); the padding's ids are real words too, so that reading them shows."""
    ids = torch.randint(WORDS, (len(lengths), tokens), generator=torch.Generator().manual_seed(0))
    valid = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    return ids, valid.flip(1) if left else valid


def encoder(mask: Any = models.boolean, pool: Any = models.mean, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Encoder(mask, pool, **options).double().eval()


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="tokred", options={"lower": "eager", **options})


def agree(model: nn.Module, fast: Any, *inputs: Tensor, tolerance: float = 1e-10) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=tolerance, atol=tolerance)


def refusals() -> list[str]:
    return [r.code for g in tokred.reports().graphs for p in g.passes if p.name == "pack_tokens" for r in p.refusals]


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("mask", [models.boolean, models.additive, models.infinite, models.causal])
def test_only_rows_that_are_read_are_computed(mask: Any, pool: Any, ran: list[int]) -> None:
    """With padding on the right, and on the left."""
    model = encoder(mask, pool)
    fast, sides = compiled(model), (batch(), batch(left=True))
    for inputs in sides:
        agree(model, fast, *inputs)
    by_position = 3 - int(sides[1][1][:, 0].sum()) if pool is models.first else 0  # h[:, 0] of left padding is padding
    assert ran == [sum(LENGTHS), sum(LENGTHS) + by_position]


@pytest.mark.slow
@pytest.mark.parametrize(
    "pool, code",
    [
        (models.all_rows, "padding-is-returned"),
        (models.plain_mean, "padding-is-read"),
        (models.plain_max, "padding-is-read"),
        (models.everything_but_first, "padding-is-read"),
        (models.weighted_by_features, "padding-is-read"),
    ],
)
def test_rows_of_padding_that_are_read_are_left_as_they_are(pool: Any, code: str, ran: list[int]) -> None:
    model = encoder(pool=pool, layers=1)
    agree(model, compiled(model), *batch())
    assert ran == [] and refusals() == [code]


@pytest.mark.slow
@pytest.mark.parametrize("later, code", [(models.nothing, ["unmasked"]), (models.half, [])])
def test_what_one_layer_sees_is_real_in_all(later: Any, code: list[str], ran: list[int]) -> None:
    model, (ids, valid) = encoder(later=later), batch()
    agree(model, compiled(model), ids, valid)
    seen = sum(min(length, 8) for length in LENGTHS) + sum(length < 8 for length in LENGTHS)
    assert ran == ([] if code else [seen]) and refusals() == code


def test_an_encoder_without_masks_is_not_asked(ran: list[int]) -> None:
    model = encoder(models.nothing, models.plain_mean)
    agree(model, compiled(model), *batch())
    assert ran == refusals() == []


def test_all_and_none_and_one(ran: list[int]) -> None:
    model = encoder()
    fast = compiled(model)
    for lengths, rows in ((8, 8, 8), []), ((0, 0, 0), []), ((1, 0, 0), []), ((2, 0, 0), [2]):
        agree(model, fast, *batch(lengths))
        assert ran == rows, lengths


def test_a_sample_that_is_all_padding_sees_itself_through_a_finite_mask(ran: list[int]) -> None:
    model = encoder(models.additive, models.first)
    agree(model, compiled(model), *batch((4, 0, 3)))
    assert ran == [4 + 8 + 3]  # its first row is read, and weighs all its keys alike


def test_one_broken_sample_does_not_reach_the_others(ran: list[int]) -> None:
    model, (ids, valid) = encoder(), batch()
    with torch.no_grad():
        model.words.weight[0] = torch.nan
        ids[ids == 0], ids[0, 0] = 1, 0
        result, expected = compiled(model)(ids, valid), model(ids, valid)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10, equal_nan=True)
    assert ran and not result[1:].isnan().any()


def test_one_compilation_serves_every_amount_of_padding(ran: list[int]) -> None:
    model = encoder(layers=1)
    fast = compiled(model, lower="aot_eager")
    for lengths in ((7, 3, 1), (1, 1, 1), (8, 8, 7), (8, 8, 8), (2, 5, 8)):
        agree(model, fast, *batch(lengths))
    assert ran == [11, 3, 23, 15] and len(tokred.reports().graphs) == 1


@pytest.mark.slow
def test_run_time_sizes(ran: list[int]) -> None:
    model = encoder(layers=1)
    fast = compiled(model, lower="aot_eager")
    for lengths, tokens in (((7, 3, 1), 8), ((5, 2, 9, 1), 10), ((3, 2), 11), ((12,) * 5, 12)):
        agree(model, fast, *batch(lengths, tokens))
    assert ran == [11, 17, 5] and len(tokred.reports().graphs) == 2


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float64])
def test_validity_of_other_types(kind: torch.dtype, ran: list[int]) -> None:
    model, (ids, valid) = encoder(layers=1), batch()
    agree(model, compiled(model), ids, valid.to(kind))
    assert ran == [11]


@pytest.mark.parametrize("mask", [models.boolean, models.additive])
def test_bfloat16(mask: Any, ran: list[int]) -> None:
    def half(valid: Tensor) -> Tensor:
        made: Tensor = mask(valid)
        least = torch.finfo(torch.bfloat16).min
        return made if made.dtype == torch.bool else made.clamp(min=least).bfloat16()

    model, inputs = encoder(half).bfloat16(), batch()
    with torch.no_grad():
        exact, dense, got = encoder(mask)(*inputs), model(*inputs), compiled(model)(*inputs)
    assert ran == [11] and got.dtype == torch.bfloat16
    error = [(x.double() - exact).abs().max() for x in (got, dense)]
    assert error[0] <= error[1] + torch.finfo(torch.bfloat16).eps


def test_a_mask_of_a_small_number_hides_nothing_for_certain(ran: list[int]) -> None:
    """exp(-1e4 + score) is zero unless a score is near 1e4, and no one knows: every row may be read."""
    model = encoder(lambda valid: (1.0 - valid[:, None, None, :].double()) * -1e4)
    agree(model, compiled(model), *batch())
    assert ran == refusals() == []


@pytest.mark.slow
def test_gradients(ran: list[int]) -> None:
    """Of a batch that is packed, and of one that is not."""
    model = encoder()
    fast, parameters = compiled(model, lower="aot_eager"), list(model.parameters())
    for lengths in (LENGTHS, (8, 8, 8)):
        inputs = batch(lengths)
        expected = torch.autograd.grad(model(*inputs).square().sum(), parameters)
        got = torch.autograd.grad(fast(*inputs).square().sum(), parameters)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        assert ran == [11]


def test_dropout_in_training_is_not_drawn_anew(ran: list[int]) -> None:
    model, inputs = encoder(dropout=0.5), batch()
    compiled(model)(*inputs)
    assert ran == [] and refusals() == ["random"]


def test_inference_mode_verify_and_report(ran: list[int]) -> None:
    model, inputs = encoder(), batch()
    with torch.inference_mode():
        result = compiled(model, verify=True)(*inputs)
        torch.testing.assert_close(result, model(*inputs), rtol=1e-10, atol=1e-10)
    assert ran and set(ran) == {11}
    assert "2 attention blocks run on real tokens only" in str(tokred.explain(model, *inputs))


def test_a_small_model_does_not_pay(ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = encoder()
    agree(model, compiled(model), *batch())
    assert ran == [] and refusals() == ["does-not-pay"]


def test_a_twentieth_of_padding_is_the_least_that_pays(ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine's products are."""
    monkeypatch.undo()
    slow = Machine("slow", {torch.float32: 1.0, torch.float64: 1.0}, 1e12, 0.0)
    monkeypatch.setattr(Machine, "of", staticmethod(lambda device: slow))
    assert "where more than 5% are padding" in str(tokred.explain(encoder(), *batch()))


def test_a_recipe_and_exact_false_leave_it_out(ran: list[int]) -> None:
    model, inputs = encoder(), batch()
    agree(model, compiled(model, exact=False), *inputs)
    torch._dynamo.reset()
    compiled(model, recipe="norm(keep=0.9, layers=[7])")(*inputs)
    assert ran == [] and refusals() == ["recipe"]


@pytest.mark.slow
def test_inductor(ran: list[int]) -> None:
    model, inputs = encoder().float(), batch()
    agree(model, compiled(model, lower="inductor"), *inputs, tolerance=1e-5)
    assert ran == [11]


class Pooled(nn.Module):
    """A transformers encoder as sentence-transformers wraps it."""

    def __init__(self, model: nn.Module, pool: Any):
        super().__init__()
        self.model, self.pool = model, pool

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        result: Tensor = self.pool(self.model(input_ids=ids, attention_mask=valid).last_hidden_state, valid)
        return result


PADDED = ("bert_padded", "bert_eager", "modernbert", "mpnet", "t5_encoder", "esm", "minilm")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, pool",
    [(name, models.mean) for name in PADDED]
    + [(name, models.first) for name in ("bert_padded", "modernbert", "mpnet")],
)
def test_encoders_of_transformers(name: str, pool: Any, ran: list[int]) -> None:
    architecture = ARCHITECTURES[name]
    model = Pooled(architecture.model(torch.float64), pool)
    ids = architecture.example(3, torch.float64)["input_ids"]
    valid = (torch.arange(ids.shape[1]) < torch.tensor([ids.shape[1], 9, 4])[:, None]).long()
    agree(model, compiled(model), ids, valid)
    assert ran == [ids.shape[1] + 9 + 4]
