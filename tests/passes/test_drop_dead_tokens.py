"""Token liveness: what reads a few rows computes a few rows, with the same numbers, and what reads all computes all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.decoders.models import LENGTH, prompts
from tests.passes.rewriting import normal
from tests.passes.sparse_models import made
from tokred.compiler.capture import capture
from tokred.compiler.options import parse_options
from tokred.compiler.pipeline import transform
from tokred.passes.drop_dead_tokens import drop_dead_tokens

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
PRODUCTS = {aten.linear.default, aten.addmm.default}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Narrowed:
    """A backend that runs one graph as the exact passes leave it, or as one function does, and keeps it."""

    def __init__(self, run: Callable[[fx.GraphModule, list[str]], fx.GraphModule] | None = None, **options: Any):
        self.run, self.graph, self.lines, self.options = run, fx.Graph(), list[str](), options

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        if self.run is None:
            module = transform(gm, inputs, parse_options(self.options, None), lambda stage, graph: None).graph
        else:
            module = self.run(capture(gm, inputs), self.lines)
        self.graph = module.graph
        return module.forward

    def rows(self, targets: set[Any]) -> list[list[int]]:
        """The sizes of each result of these ops, in order."""
        return [list(node.meta["val"].shape) for node in self.graph.nodes if node.target in targets]


class Last(nn.Module):
    """A caller that samples: only the last logits, and the caches."""

    def __init__(self, model: nn.Module, sliced: bool):
        super().__init__()
        self.model, self.sliced = model, sliced

    def forward(self, **inputs: Tensor) -> Any:
        output = self.model(**inputs) if self.sliced else self.model(**inputs, logits_to_keep=1)
        return output.logits[:, -1], output.past_key_values


CALLERS = [("llama", True, True), ("llama", False, False), ("mistral", False, True), ("qwen3", True, False)]
CALLERS += [("gemma3", True, True), ("gpt2", True, True), ("phi3", True, False)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sliced", "padded"), CALLERS)
def test_the_last_logits_need_one_row_of_the_last_layer_and_all_of_every_cache(
    name: str, sliced: bool, padded: bool
) -> None:
    caller, narrowed = Last(made(name), sliced), Narrowed()
    inputs = prompts() if padded else {"input_ids": prompts()["input_ids"]}
    with torch.no_grad():
        logits, cache = torch.compile(caller, backend=narrowed, fullgraph=True)(**inputs)
        expected, whole = caller(**inputs)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    for layer, other in zip(cache.layers, whole.layers, strict=True):
        assert layer.keys.shape[2] == layer.values.shape[2] == LENGTH
        torch.testing.assert_close((layer.keys, layer.values), (other.keys, other.values), rtol=1e-10, atol=1e-10)

    assert [shape[2] for shape in narrowed.rows({SDPA})] == [LENGTH, 1]
    last = next(node for node in reversed(narrowed.graph.nodes) if node.target is SDPA)
    after = [node for node in narrowed.graph.nodes if node.target in PRODUCTS and last < node]
    assert after and all(node.meta["val"].numel() // node.meta["val"].shape[-1] == 3 for node in after)


@pytest.mark.slow
def test_behind_cuts_scores_read_one_query_and_a_last_layer_that_was_cut_computes_one_row() -> None:
    model, layers, spans = made("llama", layers=4), [1, 3], {"visual": (9, 21)}
    caller, ids = Last(model, sliced=False), prompts()["input_ids"]
    recipe = f"pyramiddrop(keep=0.5, layers={layers})"
    narrowed, plain = (Narrowed(recipe=recipe, spans=spans, outputs="reduced", exact=exact) for exact in (True, False))
    with torch.no_grad():
        logits, cache = torch.compile(caller, backend=narrowed, fullgraph=True)(input_ids=ids)
        torch._dynamo.reset()
        expected, whole = torch.compile(caller, backend=plain, fullgraph=True)(input_ids=ids)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    for layer, other in zip(cache.layers, whole.layers, strict=True):
        torch.testing.assert_close((layer.keys, layer.values), (other.keys, other.values), rtol=1e-10, atol=1e-10)
    cut, twice = LENGTH - 6, LENGTH - 9
    assert [layer.keys.shape[2] for layer in cache.layers] == [LENGTH, cut, cut, twice]
    assert [shape[2] for shape in narrowed.rows({SDPA})] == [LENGTH, cut, cut, 1]

    def queries(backend: Narrowed) -> list[int]:
        """The rows of each product with a query's weight, in order."""
        products = [node for node in backend.graph.nodes if node.target in PRODUCTS]
        named = [node for node in products if "q_proj" in str(node.meta["nn_module_stack"])]
        return [node.meta["val"].shape[1] for node in named]

    assert queries(plain) == [LENGTH, LENGTH, cut, cut, cut, twice]
    assert queries(narrowed) == [LENGTH, 1, cut, cut, 1, 1]


def test_whole_logits_need_all_rows() -> None:
    model, narrowed = made("llama"), Narrowed(drop_dead_tokens)
    with torch.no_grad():
        torch.compile(model, backend=narrowed, fullgraph=True)(**prompts())
    assert narrowed.lines == []
    assert [shape[2] for shape in narrowed.rows({SDPA})] == [LENGTH] * 2


WEIGHT = normal(8, 8)


def _causal(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x + 1, x, x, is_causal=True)


PROGRAMS: dict[str, tuple[Callable[[Tensor], Any], list[list[int]]]] = {  # on [3 7 8]; what the products compute
    "a row in front": (lambda x: F.linear(x, WEIGHT)[:, :1], [[3, 1, 8]]),
    "both ends": (lambda x: (y := F.linear(x, WEIGHT))[:, 0] + y[:, -1], [[3, 2, 8]]),
    "ends that are most of it": (lambda x: (y := F.linear(x, WEIGHT))[:, :3].sum(1) + y[:, -1], [[3, 7, 8]]),
    "halves of the channels": (lambda x: (p := F.linear(x, WEIGHT).chunk(2, -1))[0][:, -1] * p[1][:, -1], [[3, 1, 8]]),
    "one half is read whole": (lambda x: (p := F.linear(x, WEIGHT).chunk(2, -1))[0][:, -1] + p[1].sum(1), [[3, 7, 8]]),
    "a mean reads all": (lambda x: (y := F.linear(x, WEIGHT))[:, -1] + y.mean(1), [[3, 7, 8]]),
    "through the rows": (lambda x: F.linear(x + 1, WEIGHT).cumsum(1)[:, -1], [[3, 7, 8]]),
    "flat rows mean other rows": (lambda x: F.linear(x, WEIGHT).reshape(21, 8)[-2:], [[3, 7, 8]]),
    "blocks of another length": (lambda x: F.linear(x + 1, WEIGHT).reshape(7, 3, 8)[:, -1], [[3, 7, 8]]),
    "flattened, two readings": (
        lambda x: (
            (y := F.linear((x + 1).reshape(21, 8), WEIGHT)).reshape(3, 7, 8)[:, -1].sum(0)
            + y.reshape(7, 3, 8)[:, -1].sum(0)
        ),
        [[21, 8]],
    ),
    "flattened for a product": (
        lambda x: F.linear((x + 1).reshape(21, 8), WEIGHT).reshape(3, 7, 8)[:, -1],
        [[3, 8]],
    ),
    "the last causal query": (lambda x: _causal(x)[:, -1], [[3, 1, 8]]),
    "the first causal queries": (lambda x: _causal(x)[:, :2], [[3, 2, 8]]),
    "causal queries at both ends": (lambda x: (y := _causal(x))[:, 0] + y[:, -1], [[3, 7, 8]]),
    "flattened with the sequence first": (
        lambda x: F.linear((x + 1).transpose(0, 1).reshape(21, 8), WEIGHT).reshape(7, 3, 8)[-1],
        [[21, 8]],
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_which_rows_a_product_computes(name: str) -> None:
    function, computed = PROGRAMS[name]
    narrowed, x = Narrowed(drop_dead_tokens), normal(3, 7, 8)
    result = torch.compile(function, backend=narrowed, fullgraph=True)(x)
    torch.testing.assert_close(result, function(x), rtol=1e-10, atol=1e-10)
    assert narrowed.rows(PRODUCTS | {SDPA}) == computed
