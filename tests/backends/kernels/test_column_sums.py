"""tokred::column_sums is what its reference computes: on CPU, compiled, and as interpreted kernels."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.kernels.interpreted import last_word
from tokred.backends.kernels import column_sums as module
from tokred.backends.kernels.column_sums import column_sums, reference

BATCH, HEADS, GROUPS, TOKENS, CHANNELS = 2, 4, 2, 37, 10
TYPES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5}  # bfloat16 goes in, float32 comes out
MASKS = ("none", "causal", "boolean", "padding", "added", "lowest")


def case(
    kind: str, dtype: torch.dtype, *, temperature: float = 1.0, steps: int = 1, tokens: int = TOKENS
) -> tuple[Any, ...]:
    """The operator's arguments."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query = normal(BATCH, tokens, HEADS, CHANNELS).to(dtype).transpose(1, 2)  # not contiguous, as models have it
    key = normal(BATCH, GROUPS, tokens, CHANNELS).to(dtype)
    weight = normal(BATCH, HEADS, tokens).exp().to(torch.float64 if dtype == torch.float64 else torch.float32)
    seen = torch.rand(BATCH, 1, tokens, tokens, generator=generator) < 0.6
    seen[0, :, 3] = False  # a row that sees nothing
    masks = {
        "boolean": seen,
        "padding": torch.arange(tokens) < torch.tensor([tokens, tokens // 2 + 2])[:, None, None, None],
        "added": normal(1, HEADS, tokens, tokens).to(dtype),
        "lowest": torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min),
    }
    return query, key, weight, masks.get(kind), kind == "causal", 0.4, temperature, steps


def gap(found: Tensor, arguments: tuple[Any, ...]) -> float:
    """The largest error, relative to the largest sum."""
    wanted = reference(*arguments)
    assert found.shape == wanted.shape
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", MASKS)
def test_blocks_of_rows_give_the_reference(kind: str, dtype: torch.dtype, monkeypatch: Any) -> None:
    for temperature, steps, elements in ((1.0, 1, 2**22), (0.1, 1, 3000), (0.5, 5, 3000)):
        monkeypatch.setattr(module, "ELEMENTS", elements)  # 3000: ten rows at a time
        arguments = case(kind, dtype, temperature=temperature, steps=steps)
        found = column_sums(*arguments)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gap(found, arguments) < TYPES[dtype]


def test_the_reference_is_the_textbook_s() -> None:
    query, key, weight, mask, _, scale, _, _ = arguments = case("boolean", torch.float64)
    key = key.repeat_interleave(HEADS // GROUPS, 1)
    attention = (query @ key.mT * scale).masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    torch.testing.assert_close((weight.unsqueeze(2) @ attention).squeeze(2), reference(*arguments))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_serves_batches_of_several_sizes(backend: str) -> None:
    torch.compiler.reset()
    graphs = 0

    def counted(gm: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(gm, inputs)  # type: ignore[operator]

    def function(q: Tensor, k: Tensor, w: Tensor, m: Tensor) -> Tensor:
        return column_sums(q * 1, k, w, m, False, 0.4, 0.1, 2) + 0

    compiled = torch.compile(function, backend=counted, fullgraph=True)
    query, key, weight, mask, *_ = case("boolean", torch.float32)
    for times in (1, 2, 3):
        inputs = [
            x.repeat(times, 1, 1, 1) if x.dim() == 4 else x.repeat(times, 1, 1) for x in (query, key, weight, mask)
        ]
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 0)
        found = compiled(*inputs)
        assert gap(found, (*inputs, False, 0.4, 0.1, 2)) < 2e-5
    assert graphs == 1
    torch.compiler.reset()


def test_the_operator_is_registered_as_it_should_be() -> None:
    torch.library.opcheck(column_sums, case("boolean", torch.float32), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("steps", "tokens"), [(0, TOKENS), (2, 5)])
def test_steps_that_cannot_be_are_errors(steps: int, tokens: int) -> None:
    query, key, weight, *_ = case("none", torch.float32)
    with pytest.raises(ValueError, match=f"{steps} steps over {tokens} rows"):
        column_sums(query[:, :, :tokens], key, weight[:, :, :tokens], None, False, 1.0, 1.0, steps)


@pytest.mark.slow
def test_the_kernels_give_the_reference() -> None:
    assert last_word("tests.backends.kernels.test_column_sums") == str(len(MASKS) * len(TYPES))


def main() -> None:
    """Every case through Triton's interpreter: it must be on before Triton is imported, hence a process of its own."""
    from tokred.backends.kernels.column_sums_triton import launch

    cases = list(product(MASKS, TYPES))
    for kind, dtype in cases:
        # in float64 there are two by two tiles
        temperature, steps, tokens = (0.1, 3, 20) if dtype == torch.float64 else (1.0, 1, TOKENS)
        arguments = case(kind, dtype, temperature=temperature, steps=steps, tokens=tokens)
        found = gap(launch(*arguments), arguments)
        assert found < TYPES[dtype], f"{kind}, {dtype}, {temperature}, {steps}: off by {found}"
    print(len(cases))


if __name__ == "__main__":
    main()
