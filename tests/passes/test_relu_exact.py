"""Zeros of a ReLU are skipped where few tokens make that pay, with the same numbers, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from tokred.passes import relu_exact as module

ACTIVATIONS = {
    "relu": torch.relu,
    "squared": lambda x: torch.relu(x).square(),
    "power": lambda x: torch.relu(x) ** 2,
    "product": lambda x: torch.relu(x) * torch.relu(x),
    "gate": lambda x: torch.relu(x) * (x + 1),
    "cast": lambda x: torch.relu(x.float()).to(x.dtype),
    "view": lambda x: torch.relu(x).unflatten(-1, (2, -1)).flatten(-2),
}
OTHERS = {
    "gelu": torch.nn.functional.gelu,
    "leaky": torch.nn.functional.leaky_relu,
    "none": lambda x: x,
    "shifted": lambda x: torch.relu(x) + 1,
    "exponential": lambda x: torch.relu(x) ** -1,
    "ones": lambda x: torch.relu(x) ** 0,
}


class Mlp(nn.Module):
    def __init__(self, activation: Any, dtype: torch.dtype = torch.float32, width: int = 16) -> None:
        super().__init__()
        self.activation = activation
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.second(self.activation(self.first(x)))
        return y


def skipped(model: nn.Module, x: Tensor, **options: Any) -> tuple[Tensor, list[str]]:
    """The compiled model's result, and what relu_exact said of it."""
    tokred.reset()
    torch.compiler.reset()
    result = tokred.compile(model, fullgraph=True, **{"lower": "aot_eager", "verify": True, **options})(x)
    (graph,) = tokred.reports().graphs
    torch.compiler.reset()
    return result, [line for each in graph.passes if each.name == "relu_exact" for line in each.lines]


@pytest.fixture
def free(monkeypatch: Any) -> None:
    """A call costs nothing: the smallest weight pays."""
    monkeypatch.setattr(module, "CALL", 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_same_numbers(name: str, dtype: torch.dtype, free: None) -> None:
    torch.manual_seed(0)
    model = Mlp(ACTIVATIONS[name], dtype)
    for shape in ((1, 1, 16), (2, 4, 16), (3, 16)):
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            found, lines = skipped(model, x)
            torch.testing.assert_close(found, model(x))
        size = f"{model.second.weight.nbytes / 2**20:.1f} MB"
        assert lines == [f"second: zeros of the ReLU are skipped; its weight is held a second time, {size}"]


@pytest.mark.parametrize("name", OTHERS)
def test_near_misses(name: str, free: None) -> None:
    with torch.no_grad():
        assert skipped(Mlp(OTHERS[name]), torch.randn(1, 16), verify=False)[1] == []  # some are infinite


def test_not_where_it_cannot_pay_or_would_lose_a_gradient(free: None, monkeypatch: Any) -> None:
    model, x = Mlp(torch.relu), torch.randn(1, 16)
    assert skipped(model, x, verify=False)[1] == []  # gradients are wanted
    with torch.no_grad():
        assert skipped(model, torch.randn(9, 16))[1] == []
        assert skipped(model.double(), x.double())[1] == []
        assert skipped(model.float(), x, exact=False)[1] == []
        assert len(skipped(model, x)[1]) == 1
        monkeypatch.setattr(module, "CALL", 5)
        assert skipped(model, x)[1] == []
        wide = Mlp(torch.relu, width=512)  # 4 MB
        assert len(skipped(wide, torch.randn(1, 512))[1]) == 1
        assert skipped(wide, torch.randn(8, 512))[1] == []  # one in 256 is zero for all eight


def test_weights_and_their_copies_stay_in_their_place(free: None, monkeypatch: Any) -> None:
    """What AOTAutograd is not told so CUDA graphs copy in front of each replay."""
    module, seen = torch._functorch.aot_autograd, []
    asked = module._try_get_metadata_from_dynamo

    def spy(*arguments: Any) -> Any:
        seen.append(asked(*arguments))
        return seen[-1]

    monkeypatch.setattr(module, "_try_get_metadata_from_dynamo", spy)
    with torch.no_grad():
        assert len(skipped(Mlp(torch.relu), torch.randn(1, 16), verify=False)[1]) == 1
    ((sources, fixed),) = seen
    moving = [number for number in range(len(sources)) if number not in fixed]
    assert [sources[number].name for number in moving] == ["L['x']"] and len(sources) == 6


class Cast(Mlp):
    """Enters autocast itself, or, as transformers' rotary embeddings do, leaves it."""

    def __init__(self, enabled: bool) -> None:
        super().__init__(torch.relu)
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return super().forward(x)


@pytest.mark.parametrize(
    "model, outside, count", [(Mlp(torch.relu), True, 0), (Cast(True), False, 0), (Cast(False), False, 1)]
)
def test_autocast_is_left_alone(model: nn.Module, outside: bool, count: int, free: None) -> None:
    """It computes products in another type than the weights'."""
    x = torch.randn(1, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=outside):
        found, lines = skipped(model, x, verify=False)
        assert len(lines) == count
        torch.testing.assert_close(found, model(x))


def test_gradients_are_the_model_s_own(free: None) -> None:
    model, x = Mlp(torch.relu), torch.randn(1, 16)
    wanted = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    found = torch.autograd.grad(skipped(model, x, verify=False)[0].sum(), list(model.parameters()))
    torch.testing.assert_close(found, wanted)


@pytest.mark.slow
def test_a_compiled_model_follows_its_weights_and_never_compiles_again(free: None) -> None:
    tokred.reset()
    torch.compiler.reset()
    model = Mlp(torch.relu)
    compiled = tokred.compile(model, fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 16)
            torch.testing.assert_close(compiled(x), model(x))
            model.load_state_dict(Mlp(torch.relu).state_dict())
    assert len(tokred.reports().graphs) == 1
    torch.compiler.reset()


@pytest.mark.slow
def test_generating_with_a_relu_decoder(free: None) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    torch.compiler.reset()
    sizes: dict[str, Any] = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=99, max_position_embeddings=64, word_embed_proj_dim=32, **sizes)
    model = OPTForCausalLM(config).eval()
    prompt = torch.randint(4, 99, (1, 12))
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = model.generate(prompt, **settings)
    tokred.reset()
    found = tokred.compile(model, lower="aot_eager").generate(prompt, **settings)
    assert torch.equal(found, wanted)
    changed = [each.changes for graph in tokred.reports().graphs for each in graph.passes if each.name == "relu_exact"]
    assert sorted(changed) == [1, 2, 2]  # of a prompt, only the last layer computes a single row: its last
    torch.compiler.reset()
