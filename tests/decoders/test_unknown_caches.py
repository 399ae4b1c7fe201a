"""What a graph returns beside its results behind a cut: caches as tokred knows them, others, and what is no cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import tokred

Returned = Callable[..., Any]  # the layer's number, and its tensors by name

TOKENS, WIDTH, HEADS, LAYERS = 10, 16, 2, 3
RECIPE = "norm(keep=0.5, layers=[1])"  # layer 2 attends among five of the ten tokens


class Layer(nn.Module):
    """Causal attention whose keys come from a latent and are scaled; and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.query, self.latent = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 6)
        self.key, self.value, self.out = nn.Linear(6, WIDTH), nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        normed = self.norms[0](x)
        latent = self.latent(normed)  # [B N 6]
        q, k, v = (
            y.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # [B H N D]
            for y in (self.query(normed), self.key(latent), self.value(latent))
        )
        early, k = k, k * 0.5
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norms[1](x))
        return x, {"latent": latent, "early": early, "key": k, "value": v, "hidden": x}


class Decoder(nn.Module):
    """Embeddings [B N C] -> logits, and what `returned` makes of each layer's tensors."""

    def __init__(self, returned: Returned, last: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head, self.returned, self.last = nn.Linear(WIDTH, 20), returned, last

    def forward(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        kept = []
        for number, layer in enumerate(self.layers):
            x, seen = layer(x)
            kept.append(self.returned(number, **seen))
        return self.head(x[:, -1:] if self.last else x), kept


def run(model: nn.Module) -> tuple[Any, Any, Any]:
    """What the model gives as it is and compiled, and the report's row for the attention that the recipe names."""
    torch._dynamo.reset()
    tokred.reset()
    model = model.double().eval()
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fast = torch.compile(model, backend="tokred", options={"recipe": RECIPE, "lower": "eager"})
    with torch.no_grad():
        results = model(x), fast(x)
    return *results, [b for g in tokred.reports().graphs for b in g.blocks if b.kind == "attention"][1]


def stacked(number: int, key: Tensor, value: Tensor, **_: Tensor) -> Tensor:
    return torch.stack([key, value])


@pytest.mark.slow
@pytest.mark.parametrize(
    "returned, last",
    [
        pytest.param(stacked, False, id="stacked"),
        pytest.param(stacked, True, id="stacked, one row of the last layer is read"),
        pytest.param(lambda number, key, **_: key.float(), False, id="cast"),
        pytest.param(lambda number, value, **_: (value * 127).round().to(torch.int8), False, id="quantised"),
        pytest.param(lambda number, early, **_: early, False, id="before scaling"),
        pytest.param(lambda number, latent, **_: latent, False, id="latent"),
        pytest.param(lambda number, key, **_: key.roll(1, 2), False, id="all rows again, then rolled"),
    ],
)
def test_keys_in_a_form_that_is_not_known_keep_their_tokens(returned: Returned, last: bool) -> None:
    expected, got, block = run(Decoder(returned, last))
    assert block.refusal and block.refusal.code == "unknown-cache"
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_cache_as_it_is_known_is_short() -> None:
    _, (logits, short), block = run(Decoder(lambda number, key, value, **_: (key, value)))
    assert block.method and not block.refusal
    assert logits.shape[1] == TOKENS
    assert [[y.shape[2] for y in layer] for layer in short] == [[TOKENS] * 2, [TOKENS] * 2, [TOKENS // 2] * 2]


def test_in_front_of_the_cut_a_cache_looks_as_it_likes_and_hidden_states_are_restored() -> None:
    def returned(number: int, hidden: Tensor, **seen: Tensor) -> Tensor:
        return hidden.float() if number == LAYERS - 1 else stacked(number, **seen)

    _, (_, (*front, hidden)), block = run(Decoder(returned))
    assert block.method and not block.refusal
    assert [cache.shape[3] for cache in front] == [TOKENS] * 2 and hidden.shape[1] == TOKENS
