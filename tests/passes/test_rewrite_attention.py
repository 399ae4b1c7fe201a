"""Where an attention is computed in another way, what the report says of it, and where it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import scaled_dot_product_attention

import tokred
from tests.reference.token_sparse import token_sparse
from tokred import AttentionRewrite, Effort
from tokred.registry.recipe import parse_recipe
from tokred.testing.models import Block, CausalBlock, TinyDecoder, TinyViT

SHORT = "token_sparse_attention(window=4, least=6, coverage=0.3"  # acts on short texts
IDS = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    tokred.reset()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def compiled(model: nn.Module, recipe: str, **options: Any) -> Any:
    return torch.compile(model, backend="tokred", options={"recipe": recipe, "lower": "eager", **options})


def rows() -> list[Any]:
    """The rows of attentions in the last report."""
    return [row for row in tokred.reports().graphs[-1].blocks if row.kind == "attention"]


def decoder() -> Any:
    model = TinyDecoder().double().eval()
    with torch.no_grad():
        for block in model.blocks:  # type: ignore[union-attr]
            block.qkv.weight.mul_(8)  # peaked scores
    return model


class Reference(TinyDecoder):
    """The same decoder with the attention of some layers written out."""

    def __init__(self, model: TinyDecoder, layers: list[int], **options: Any) -> None:
        super().__init__()
        self.double().load_state_dict(model.state_dict())
        for layer in layers:
            self.blocks[layer].attend = lambda q, k, v: token_sparse(q, k, v, **options)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = _by_hand(block, x)
        logits: Tensor = self.norm(x) @ self.words.weight.t()
        return logits


def _by_hand(block: Any, x: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    qkv = block.qkv(block.norm1(x)).view(batch, tokens, 3, 4, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1, :, :2], qkv[2, :, :2]
    attend: Callable[..., Tensor] = getattr(block, "attend", None) or (
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    )
    x = x + block.out(attend(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
    return x + block.mlp(block.norm2(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("more", "layers"), [("", [1, 2]), (", layers=[0])", [0]), (", grouped=True)", [1, 2])])
def test_the_chosen_layers_are_computed_as_the_reference_does(more: str, layers: list[int]) -> None:
    model = decoder()
    options = {"window": 4, "least": 6, "coverage": 0.3, "kernel": 7, "grouped": "grouped" in more}
    with torch.no_grad():
        got = compiled(model, SHORT + (more or ")"))(IDS)
        torch.testing.assert_close(got, Reference(model, layers, **options)(IDS), rtol=1e-10, atol=1e-10)
        assert (got - model(IDS)).abs().max() > 1e-3
    found = rows()
    assert [row.layer for row in found if row.method] == layers
    assert all(row.tokens == (30, 30) and row.refusal is None for row in found)
    acted = found[layers[0]]
    assert acted.flops[1] < acted.flops[0]
    assert "pays from" in acted.note and "half of the tokens" in acted.note


@pytest.mark.slow
def test_through_inductor() -> None:
    model = decoder().float()
    with torch.no_grad():
        got = compiled(model, SHORT + ")", lower="inductor", verify=True)(IDS)
        torch.testing.assert_close(got, compiled(model, SHORT + ")")(IDS), rtol=1e-4, atol=1e-4)


def test_training_runs() -> None:
    model = decoder()
    loss = compiled(model, SHORT + ")", lower="aot_eager")(IDS).square().mean()
    got = torch.autograd.grad(loss, list(model.parameters()))
    wanted = torch.autograd.grad(compiled(model, SHORT + ")")(IDS).square().mean(), list(model.parameters()))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_a_dynamic_length_is_one_graph() -> None:
    model = decoder()
    function = compiled(model, SHORT + ")")
    options = {"window": 4, "least": 6, "coverage": 0.3}
    with torch.no_grad():
        for length in (30, 25, 11):
            ids = IDS[:, :length].clone()
            torch._dynamo.mark_dynamic(ids, 1)
            wanted = Reference(model, [1, 2], **options)(ids)
            torch.testing.assert_close(function(ids), wanted, rtol=1e-10, atol=1e-10)
    assert len(tokred.reports().graphs) == 1


# -- where not --------------------------------------------------------------------------------------------------------


class Masked(TinyDecoder):
    """A decoder whose mask is computed from the positions."""

    def mask(self, places: Tensor) -> Tensor:
        return places <= places.unsqueeze(1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        mask = self.mask(torch.arange(ids.shape[1]))[None, None]
        for block in self.blocks:
            x = x + block.out(self.attend(block, block.norm1(x), mask))
        logits: Tensor = self.norm(x) @ self.words.weight.t()
        return logits

    def attend(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = block.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class Windowed(Masked):
    def mask(self, places: Tensor) -> Tensor:
        return super().mask(places) & (places > places.unsqueeze(1) - 8)


class Biased(Masked):
    """ALiBi."""

    def mask(self, places: Tensor) -> Tensor:
        distance = (places - places.unsqueeze(1)).double()
        return distance.masked_fill(distance > 0, -torch.inf)


class Dropping(Masked):
    def attend(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = block.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v, mask, dropout_p=0.1).transpose(1, 2).flatten(2)


class Scaled(Masked):
    """Scores are multiplied by a number of the model's own; `how` computes the attention."""

    how: Any = staticmethod(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.9))

    def attend(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = block.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attended: Tensor = self.how(q, k, v)
        return attended.transpose(1, 2).flatten(2)


class Crossed(Masked):
    """Queries of the text, keys and values of something else."""

    def attend(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        q = block.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)[0]
        _, k, v = block.qkv(self.words.weight).unflatten(-1, (3, 4, -1)).permute(1, 2, 0, 3)
        k, v = (part.expand(len(x), -1, -1, -1) for part in (k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Written(Masked):
    """Softmax between two products."""

    def attend(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = block.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


class Flat(Masked):
    """Heads are samples: [B*H N D]."""

    def attend(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = block.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.unflatten(0, (-1, 4)).transpose(1, 2).flatten(2)


class OneKey(Masked):
    """One key for all heads, but a value for each."""

    def attend(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = block.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k[:, :1], v, is_causal=True).transpose(1, 2).flatten(2)


def codes(model: nn.Module, recipe: str, *inputs: Tensor, **options: Any) -> list[str]:
    with torch.no_grad():
        compiled(model.double().eval(), recipe, **options)(*inputs)
    return [row.refusal.code for row in rows() if row.refusal]


def test_a_causal_mask_is_as_good_as_the_flag() -> None:
    assert codes(Masked(), SHORT + ")", IDS) == []
    assert [row.layer for row in rows() if row.method] == [1, 2]


@pytest.mark.parametrize(("kind", "code"), [(Windowed, "windowed"), (Biased, "windowed"), (Dropping, "dropout")])
def test_other_masks_and_dropout_are_refused(kind: type[nn.Module], code: str) -> None:
    assert codes(kind(), SHORT + ")", IDS) == [code, code]


def test_the_scale_is_the_model_s_own() -> None:
    model, wanted = Scaled().double(), Scaled().double()
    wanted.load_state_dict(model.state_dict())
    options: dict[str, Any] = {"window": 4, "least": 6, "coverage": 0.3}
    wanted.how = lambda q, k, v: token_sparse(q, k, v, **options, scale=0.9)
    with torch.no_grad():
        got = compiled(model, SHORT + ", layers=':')")(IDS)
        torch.testing.assert_close(got, wanted(IDS), rtol=1e-10, atol=1e-10)
        wanted.how = lambda q, k, v: token_sparse(q, k, v, **options)
        assert (got - wanted(IDS)).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("kind", "code"), [(Crossed, "cross-attention"), (Written, "no-sdpa"), (Flat, "layout"), (OneKey, "layout")]
)
def test_what_is_no_plain_self_attention_is_refused_and_runs_as_it_is(kind: type[nn.Module], code: str) -> None:
    model = kind().double().eval()
    found = codes(model, SHORT + ", layers=':')", IDS, exact=kind is not Written)
    assert set(found) == {code}
    with torch.no_grad():
        got = compiled(model, SHORT + ", layers=':')", exact=kind is not Written)(IDS)
        torch.testing.assert_close(got, model(IDS), rtol=1e-10, atol=1e-10)


def test_an_encoder_is_refused() -> None:
    assert codes(TinyViT(), SHORT + ")", torch.randn(2, 3, 12, 12).double()) == ["not-causal"] * 2


def test_under_strict_an_encoder_beside_a_decoder_was_not_meant() -> None:
    class Beside(TinyDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(Block(), Block())

        def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(ids), self.encoder(image).mean(1)

    image = torch.randn(2, 9, 32).double()
    assert codes(Beside(), SHORT + ")", IDS, image, strict=True) == ["not-causal"]
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match=r"StrictError: .*not-causal"):
        codes(TinyViT(), SHORT + ")", torch.randn(2, 3, 12, 12).double(), strict=True)


def test_a_text_of_which_nothing_is_left_out_is_too_short() -> None:
    assert codes(decoder(), "token_sparse_attention()", IDS) == ["too-short"] * 2
    assert "30 tokens: token_sparse_attention leaves nothing out of fewer than 1153" in rows()[1].refusal.reason
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match=r"StrictError: .*too-short"):
        codes(decoder(), "token_sparse_attention()", IDS, strict=True)


def test_coverage_0_leaves_every_attention_alone() -> None:
    assert codes(decoder(), SHORT.replace("0.3", "0") + ")", IDS, strict=True) == []
    assert [row.method for row in rows()] == [None] * 3


def test_the_gate_refuses_what_does_not_pay_and_says_from_where_on_it_would() -> None:
    assert codes(decoder(), SHORT + ")", IDS, gate=True) == ["does-not-pay"] * 2
    assert "pays from" in rows()[1].refusal.reason


def test_a_layer_of_which_one_row_is_read_stays_dense() -> None:
    class Last(TinyDecoder):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids)[:, -1]

    assert codes(Last(), SHORT + ")", IDS, strict=True) == []
    assert [row.layer for row in rows() if row.method] == [1]


# -- methods of one's own ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FirstKeys(AttentionRewrite):
    """Every query sees the first keys alone: plain code, no operator."""

    count: int = 4

    name = "first_keys"

    @property
    def shortest(self) -> int | None:
        return self.count + 1

    def effort(self, tokens: int, channels: int) -> Effort:
        return Effort(tokens * self.count)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: Any) -> Tensor:
        few = slice(self.count)
        return scaled_dot_product_attention(query, key[:, :, few], value[:, :, few], scale=scale, enable_gqa=True)


class Misshapen(FirstKeys):
    def attend(self, query: Tensor, *rest: Any, **options: Any) -> Tensor:
        return query.mean(2)


def test_an_attention_in_plain_code() -> None:
    model = decoder()
    with torch.no_grad():
        got = compiled(model, FirstKeys(layers=[1]))(IDS)  # type: ignore[arg-type]
        wanted = Reference(model, [])
        wanted.blocks[1].attend = lambda q, k, v: scaled_dot_product_attention(
            q, k[:, :, :4], v[:, :, :4], enable_gqa=True
        )
        torch.testing.assert_close(got, wanted(IDS), rtol=1e-10, atol=1e-10)


def test_the_first_of_two_methods_computes_what_both_name() -> None:
    model = decoder()
    sparse = parse_recipe(SHORT + ")").methods[0]
    with torch.no_grad():
        compiled(model, [sparse, FirstKeys()])(IDS)  # type: ignore[arg-type]
    assert [str(row.method).split("(")[0] for row in rows()] == ["first_keys"] + ["token_sparse_attention"] * 2


class Narrow(FirstKeys):
    def attend(self, *tensors: Any, **options: Any) -> Tensor:
        return super().attend(*tensors, **options).float()


def test_a_method_that_gives_another_precision_is_refused() -> None:
    model = decoder()
    with torch.no_grad():
        assert torch.equal(compiled(model, Narrow())(IDS), model(IDS))  # type: ignore[arg-type]
    assert [row.refusal.code for row in rows()] == ["method-raised"] * 3


def test_a_method_that_gives_another_shape_is_refused_and_the_model_runs() -> None:
    model = decoder()
    with torch.no_grad():
        assert torch.equal(compiled(model, Misshapen())(IDS), model(IDS))  # type: ignore[arg-type]
    assert [row.refusal.code for row in rows()] == ["method-raised"] * 3
    assert "attend() gives [2, 4, 8]" in rows()[0].refusal.reason


def test_the_block_of_the_tests_is_the_models_own() -> None:
    """`_by_hand` with no attention of its own is the decoder."""
    model = decoder()
    assert isinstance(model.blocks[0], CausalBlock)
    with torch.no_grad():
        assert torch.equal(Reference(model, [])(IDS), model(IDS))


@pytest.mark.parametrize("wrong", ["coverage=1", "coverage=-0.1", "window=0", "least=0", "kernel=2", "grouped=1"])
def test_values_out_of_range(wrong: str) -> None:
    with pytest.raises(tokred.TokredError, match=wrong.split("=")[0]):
        parse_recipe(f"token_sparse_attention({wrong})")
