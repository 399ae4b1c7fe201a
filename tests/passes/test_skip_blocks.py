"""skip_block against the eager model whose modules give zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import tokred
from tests.decoders.models import build, prompts
from tests.one_capture import Ways
from tests.passes.sparse_models import ENCODER, MODELS, TWO, example, made
from tokred.compiler.report import GraphReport
from tokred.errors import ArgumentError
from tokred.registry.recipe import parse_recipe

EXACT = 1e-9  # relative to the outputs, in float64
MLPS = {  # what gives a layer's MLP's share of the stream, norms and scales behind it included
    "gemma3": "post_feedforward_layernorm",
    "olmo2": "post_feedforward_layernorm",
    "opt": "fc2",
    "dinov2": "layer_scale2",
}


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh")]


def dinov2() -> Any:
    torch.manual_seed(3)
    model = hf.Dinov2Model(hf.Dinov2Config(**ENCODER | {"layerscale_value": 0.7})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else None
    return model


def model_of(name: str) -> Any:
    if name == "dinov2":
        return dinov2()
    return made(name) if name in MODELS else build(name)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The longest list of modules."""
    return list(max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len))


@contextmanager
def zeroed(modules: list[nn.Module]) -> Iterator[None]:
    """Inside, these modules give zeros."""

    def zero(module: Any, args: Any, out: Any) -> Any:
        return out * 0 if isinstance(out, Tensor) else (out[0] * 0, *out[1:])

    handles = [module.register_forward_hook(zero) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mlp_of(name: str, layer: nn.Module) -> nn.Module:
    return layer.get_submodule(MLPS.get(name, "mlp"))


def run(model: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)[0]  # type: ignore[no-any-return]


def compiled(model: Any, recipe: str, **options: Any) -> Any:
    chosen: dict[str, Any] = {"recipe": recipe, "lower": "eager", "strict": True, **options}
    return torch.compile(model, backend="tokred", fullgraph=True, options=chosen)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=EXACT, atol=EXACT * float(wanted.abs().max()))


def rows_of(report: GraphReport, kind: str = "mlp") -> list[Any]:
    return [row for row in report.blocks if row.kind == kind]


def inputs_of(name: str) -> Tensor:
    return example("vit" if name in ("vit", "dinov2") else name)


ATTENTIONS = {"llama": "self_attn", "gemma3": "post_attention_layernorm", "vit": "attention"}


@pytest.mark.parametrize("name", [*MODELS, "olmo2", "dinov2"])
def test_a_layer_without_its_mlp_its_attention_and_both(name: str, subtests: pytest.Subtests) -> None:
    """Everywhere the MLP of the last layer; attention, and both, of a few models."""
    model, inputs = model_of(name), inputs_of(name)
    layers = layers_of(model)
    last = len(layers) - 1
    kinds = {"mlp": [mlp_of(name, layers[last])]}
    if name in ATTENTIONS:
        kinds["attention"] = [layers[last].get_submodule(ATTENTIONS[name])]
        kinds["both"] = kinds["attention"] + kinds["mlp"]
    recipes = {"mlp": f"skip_block(layers=[{last}])"}  # the default
    ways = Ways(
        {k: {"recipe": recipes.get(k, f"skip_block(layers=[{last}], blocks={k!r})")} for k in kinds}, strict=True
    )
    fast, dense = ways.compile(model), run(model, inputs)
    for ways.way, modules in kinds.items():
        with subtests.test(ways.way):
            with zeroed(modules):
                wanted = run(model, inputs)
            assert (wanted - dense).abs().max() > 1e-3 * wanted.abs().max()
            close(run(fast, inputs), wanted)
            for kind in ("attention", "mlp"):
                acted = [bool(row.method) for row in rows_of(ways.report, kind)]
                assert acted == [False] * last + [ways.way in (kind, "both")], kind
    rows = rows_of(ways.reports["mlp"][0])
    assert rows[last].flops[1] == 0 and rows[0].flops[1] == rows[0].flops[0]
    assert "left out" in rows[last].note


def test_weights_choose_the_smallest_and_layers_among_them(subtests: pytest.Subtests) -> None:
    """And weights for another depth are refused."""
    model, inputs = build("llama"), example("llama")
    layers = layers_of(model)
    skipped = {
        "skip_block(weights=[0.5, 0.1, 0.9, 0.1, 0.4], ratio=0.6)": (1, 3, 4),
        "skip_block(weights=[0.5, 0.1, 0.9, 0.1, 0.4], ratio=0.6, layers='3:')": (3, 4),
        "skip_block(weights=[0.5, 0.1, 0.9, 0.1, 0.4])": (1,),
    }
    other = "skip_block(weights=[1, 2, 3])"
    ways = Ways({recipe: {"strict": recipe != other} for recipe in (*skipped, other)})
    fast = ways.compile(model)
    for ways.way, gone in skipped.items():
        with subtests.test(ways.way):
            with zeroed([layers[number].mlp for number in gone]):
                wanted = run(model, inputs)
            close(run(fast, inputs), wanted)
            assert tuple(row.layer for row in rows_of(ways.report) if row.method) == gone
    ways.way = other
    close(run(fast, inputs), run(model, inputs))
    assert {row.refusal.reason for row in rows_of(ways.report)} == {"skip_block: 3 weights for 5 layers"}


def test_attention_and_mlp_side_by_side() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}
    model = hf.GPTJForCausalLM(hf.GPTJConfig(**sizes)).double().eval()
    inputs, layer = example("llama"), layers_of(model)[0]
    kinds = {"mlp": [layer.mlp], "attention": [layer.attn], "both": [layer.mlp, layer.attn]}
    ways = Ways({kind: {"recipe": f"skip_block(layers=[0], blocks={kind!r})"} for kind in kinds}, strict=True)
    fast = ways.compile(model)
    for ways.way, modules in kinds.items():
        with zeroed(modules):
            wanted = run(model, inputs)
        close(run(fast, inputs), wanted)


def test_generate_goes_on_without_the_blocks() -> None:
    """In all graphs; another method's layers keep their numbers, and the caches their lengths."""
    model, inputs = made("llama", layers=3), prompts(3)
    inputs.pop("position_ids")
    layers = layers_of(model)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with zeroed([layers[1].mlp, layers[1].self_attn]), torch.no_grad():
        wanted = model.generate(**inputs, **options)
    alone = "skip_block(layers=[1], blocks='both')"
    ways = Ways([alone, f"{alone} + core_neurons(layers=[2])"], strict=True)
    fast = ways.generating(model)
    with torch.no_grad():
        assert torch.equal(fast.generate(**inputs, **options), wanted)
    assert len(ways.reports[alone]) == 3
    *_, ways.way = ways.options
    fast.generate(**inputs, **options)
    for graph in ways.reports[ways.way]:
        acted = [row for row in rows_of(graph) if row.method]
        assert [(row.layer, row.method.partition("(")[0]) for row in acted] == [(1, "skip_block"), (2, "core_neurons")]


def test_routed_experts_are_refused() -> None:
    torch.manual_seed(0)
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**TWO | {"num_local_experts": 4})).eval()  # no float64
    got = run(compiled(model, "skip_block(layers=[1])", strict=False), example("llama"))
    torch.testing.assert_close(got, run(model, example("llama")))
    assert [row.refusal and row.refusal.code for row in rows_of(tokred.reports().graphs[0])] == [None, "no-residual"]


class Block(nn.Module):
    """An attention, and an MLP that is joined with the stream in a way of the caller's."""

    def __init__(self, join: Callable[[Tensor, Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.q, self.up, self.around = (nn.Linear(8, n) for n in (8, 16, 8))
        self.down = nn.Linear(16, 8)
        self.join = join

    def forward(self, x: Tensor) -> tuple[Tensor]:
        q = self.q(x).unsqueeze(1)
        x = x + nn.functional.scaled_dot_product_attention(q, q, q).squeeze(1)
        return (self.join(x, self.down(self.up(x).relu()), self.around),)


@pytest.mark.parametrize(
    "join",
    [
        lambda x, mlp, around: x * mlp + x,
        lambda x, mlp, around: torch.add(mlp, x, alpha=2),
        lambda x, mlp, around: around(x) + mlp,
    ],
    ids=["scaled by it", "a sum of another kind", "not the stream itself"],
)
def test_what_is_not_just_added_stays(join: Callable[[Tensor, Tensor, nn.Module], Tensor]) -> None:
    torch.manual_seed(0)
    model, inputs = Block(join).double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    got = run(compiled(model, "skip_block(layers=[0])", strict=False), inputs)
    assert torch.equal(got, run(model, inputs))
    assert [row.refusal.code for row in rows_of(tokred.reports().graphs[0])] == ["no-residual"]


class Crossing(Block):
    """A layer of a decoder behind an encoder: it attends to its own four tokens, and to those behind them."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x, other = x[:, :4], self.q(x[:, 4:]).unsqueeze(1)
        x = x + nn.functional.scaled_dot_product_attention(self.q(x).unsqueeze(1), other, other).squeeze(1)
        return super().forward(x)


def test_two_attentions_of_one_layer_stay() -> None:
    torch.manual_seed(0)
    model = Crossing(lambda x, mlp, around: x + mlp).double().eval()
    inputs = torch.randn(2, 9, 8, dtype=torch.float64)
    got = run(compiled(model, "skip_block(layers=[0], blocks='attention')", strict=False), inputs)
    assert torch.equal(got, run(model, inputs))
    rows = rows_of(tokred.reports().graphs[0], "attention")
    assert [row.refusal.code for row in rows] == ["cross-attention"] * 2


@pytest.mark.parametrize(
    "arguments", ["", "ratio=0.5", "layers=[1], blocks='norm'", "weights=[1, 'x']", "weights=[1.0], ratio=1"]
)
def test_arguments_out_of_range_are_errors(arguments: str) -> None:
    with pytest.raises(ArgumentError, match="skip_block"):
        parse_recipe(f"skip_block({arguments})")
