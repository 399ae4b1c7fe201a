"""Routed experts: what transformers sorts, multiplies in groups and puts back is one op; what only looks so is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (registers the grouped product)
from torch import Tensor, fx

import tokred
from tests.compiler.graphs import captured
from tests.decoders import oracle
from tests.zoo.decoders import ARCHITECTURES
from tokred.backends.kernels.experts import routed_experts
from tokred.passes.fold_experts import fold_experts

T, K, C, E, HIDDEN = 12, 2, 8, 4, 6
PRODUCT = "transformers::grouped_mm_fallback"
Step = Callable[..., Any]


def operands(rows: int = T) -> list[Tensor]:
    """rows [T C], experts [T K], weights [T K], up [E 2F C], down [E C F] as transformers keeps them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, C), (rows, K), (E, 2 * HIDDEN, C), (E, C, HIDDEN)]
    x, weights, up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x, torch.randint(0, E, (rows, K), generator=generator), weights, up, down]


def experts_as_transformers(**steps: Step) -> Step:
    """transformers' grouped_mm_experts_forward, with some of its steps changed."""

    def step(name: str, usual: Step) -> Step:
        return steps.get(name, usual)

    def run(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        grouped = torch.ops.transformers.grouped_mm_fallback
        chosen, order = step("sort", lambda ids: torch.sort(ids))(experts.reshape(-1))
        picked = x[step("rows", lambda o: o // K)(order)]
        by = weights.reshape(-1)[step("weigh", lambda o: o)(order)]
        counts = torch.histc(chosen.float(), bins=E, min=0, max=step("top", lambda: E - 1)())
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        first, second = grouped(picked, up.transpose(-2, -1), ends).chunk(2, dim=-1)
        hidden = step("gate", lambda a, b: F.silu(a) * b)(first, second)
        out = grouped(hidden, step("down", lambda w: w.transpose(-2, -1))(down), step("ends", lambda e: e)(ends))
        out = out * by.unsqueeze(-1)
        inverse = torch.empty_like(order)
        inverse[step("places", lambda o: o)(order)] = step("count", lambda n: torch.arange(n))(order.shape[0])
        return out[step("back", lambda i: i)(inverse)].view(T, K, C).sum(1)

    return run


def folded(function: Step) -> fx.GraphModule:
    (graph,) = captured(function, *operands())
    return fold_experts(graph)


@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.relu])
def test_they_are_one_op_and_the_same_numbers(activation: Any) -> None:
    experts = experts_as_transformers(gate=lambda a, b: activation(a) * b)
    (graph,) = captured(experts, *operands())
    after = fold_experts(graph)
    assert len(after.graph.find_nodes(op="call_function", target=routed_experts)) == 1
    assert not after.graph.find_nodes(op="call_function", target=torch.ops.aten.sort.default)
    by_name = dict(zip(("x", "experts", "weights", "up", "down"), operands(), strict=True))
    inputs = [by_name[node.meta["source_name"].split("_")[1]] for node in graph.graph.find_nodes(op="placeholder")]
    assert torch.equal(after(*inputs)[0], experts(*operands()))


NEAR: dict[str, dict[str, Step]] = {
    "sorted the other way round": {"sort": lambda ids: torch.sort(ids, descending=True)},
    "other rows": {"rows": lambda order: order // 1 % T},
    "weights not sorted": {"weigh": lambda order: torch.arange(T * K)},
    "groups of other experts": {"top": lambda: E},
    "no activation": {"gate": lambda a, b: a * b},
    "another activation": {"gate": lambda a, b: F.gelu(a, approximate="tanh") * b},
    "one half twice": {"gate": lambda a, b: F.silu(a) * a},
    "the halves change places": {"gate": lambda a, b: F.silu(b) * a},
    "groups that end elsewhere": {"ends": lambda ends: ends.flip(0)},
    "not put back": {"back": lambda inverse: inverse.flip(0)},
    "put back by the order": {"places": lambda order: torch.arange(T * K)},
    "numbered from one": {"count": lambda n: torch.arange(1, n + 1) % n},
}


@pytest.mark.parametrize("steps", NEAR.values(), ids=list(NEAR))
def test_what_only_looks_like_experts_is_left_alone(steps: dict[str, Step]) -> None:
    assert not folded(experts_as_transformers(**steps)).graph.find_nodes(op="call_function", target=routed_experts)


def test_each_row_is_its_own_experts_alone() -> None:
    x, experts, _, up, down = operands()
    up, down = up.transpose(-2, -1), down.transpose(-2, -1)
    out = routed_experts(x, experts, up, down, "silu", PRODUCT)
    for t in range(T):
        for k in range(K):
            gate, value = (x[t] @ up[experts[t, k]]).chunk(2)
            torch.testing.assert_close(out[t, k], (F.silu(gate) * value) @ down[experts[t, k]], rtol=1e-12, atol=1e-12)
    some = torch.tensor([7, 2, 11])
    fewer = routed_experts(x[some], experts[some], up, down, "silu", PRODUCT)
    torch.testing.assert_close(fewer, out[some], rtol=1e-12, atol=1e-12)


def test_gradients_go_through() -> None:
    x, experts, _, up, down = operands()
    leaves = [t.transpose(-2, -1).contiguous().requires_grad_() for t in (up, down)]
    x.requires_grad_()
    torch.autograd.gradcheck(lambda a, b, c: routed_experts(a, experts, b, c, "silu", PRODUCT), (x, *leaves))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_compute_the_tokens_that_are_left(name: str) -> None:
    """Against transformers' loop over experts, with the dropped keys masked."""
    architecture = next(row for row in ARCHITECTURES if row.name == name)
    inputs, plain = architecture.example(), architecture.model(torch.float64)
    plain.set_experts_implementation("eager")  # type: ignore[operator]
    plain.set_attn_implementation("oracle")  # type: ignore[operator]
    image = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    image[:, 3:19] = True
    dropped = oracle.fastv(1, 0.5)(plain, inputs, image)
    with torch.no_grad(), oracle.masked(dropped):
        wanted = plain(**inputs).logits
    tokred.reset()
    torch.compiler.reset()
    options = {"lower": "aot_eager", "spans": {"visual": (3, 19)}}
    with torch.no_grad():
        logits = tokred.compile(architecture.model(torch.float64), "fastv(layer=1, keep=0.5)", **options)(
            **inputs
        ).logits
    assert (logits - wanted)[~dropped[1]].abs().max() < 1e-9 * wanted.abs().max()
    rows = [block for graph in tokred.reports().graphs for block in graph.blocks if block.kind == "mlp"]
    assert [row.tokens for row in rows] == [(24, 24), (24, 16), (24, 16)]
    assert sum(row.form == "routed" for row in rows) == {"mixtral": 3, "qwen3_moe": 2}[name]
