"""sparse_linear and gated_tail are what their references compute: in C++, without it, compiled, as Triton kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.backends.kernels.interpreted import last_word
from tokred.backends.kernels import native, neurons
from tokred.backends.kernels.neurons import gated_tail, gated_tail_reference, sparse_linear, sparse_linear_reference

# Sums are in float32, or float64; the last step rounds to the type. Relative to the largest result.
TYPES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
ACTIVITY = ("none", "all", "half", "threshold", "one", "last")
SIZES = {"odd": (37, 51, 29), "vectors": (64, 96, 32), "single": (5, 1, 1)}  # F, D, C
OPERATORS = {
    "sparse_linear": (sparse_linear, sparse_linear_reference),
    "gated_tail": (gated_tail, gated_tail_reference),
}


def case(
    name: str, activity: str, tokens: int, dtype: torch.dtype, size: str = "odd", *, biased: bool = True
) -> tuple[Any, ...]:
    """The operator's arguments. Nothing is contiguous that may not be."""
    generator = torch.Generator().manual_seed(tokens)
    hidden, width, channels = SIZES[size]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def spread(rows: int, columns: int) -> Tensor:
        return normal(rows, columns + 3)[:, :columns]

    act = normal(hidden, tokens).T
    off = torch.rand(tokens, hidden, generator=generator) < 0.5
    off |= torch.rand(hidden, generator=generator) < 0.3  # for all tokens
    off = {"half": off, "all": off & False, "threshold": off & False}.get(activity, off | True)
    if activity == "one":
        off[tokens // 2, hidden // 2] = False
    if activity == "last":
        off[:, -1] = False
    act = act.masked_fill(off, 0.0)
    threshold = torch.tensor(0.8 if activity == "threshold" else 0.0)
    bias = normal(width) if biased else None
    if name == "sparse_linear":
        return act, spread(hidden, width), bias, threshold
    up_bias = normal(hidden) if biased else None
    return act, normal(tokens, channels), spread(hidden, channels), up_bias, spread(hidden, width), bias, threshold


def gap(found: Tensor, name: str, arguments: tuple[Any, ...]) -> float:
    """The largest error, relative to the largest result."""
    wanted = OPERATORS[name][1](*arguments)
    assert found.shape == wanted.shape and found.dtype == arguments[0].dtype
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def check(
    name: str, run: Callable[..., Tensor], dtype: torch.dtype, tokens: Any, size: str = "odd", *, every: bool = True
) -> None:
    """Every activity with all numbers of tokens, each with a bias and without; one of the two unless `every`."""
    for number, (activity, count, biased) in enumerate(product(ACTIVITY, tokens, (True, False))):
        if not every and (number + number // (2 * len(tokens))) % 2:
            continue
        arguments = case(name, activity, count, dtype, size, biased=biased)
        error = gap(run(*arguments), name, arguments)
        assert error <= TYPES[dtype], f"{name}, {activity}, {count} tokens, {dtype}, {size}: off by {error}"


@pytest.fixture
def threads() -> Any:
    """Three threads for the smallest product."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neurons, "WORK", 1)
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_kernels_for_cpu_give_the_reference(name: str, dtype: torch.dtype, size: str, threads: None) -> None:
    arguments = case(name, "half", 8, dtype, size)
    used = neurons._kernel(arguments[0], arguments[1 if name == "sparse_linear" else 4])
    assert (used is not None) == (dtype != torch.float64)
    check(name, OPERATORS[name][0], dtype, range(1, 9), size)


@pytest.fixture
def rounded(monkeypatch: Any) -> None:
    """Dense products of half types round on the way."""
    monkeypatch.setitem(TYPES, torch.bfloat16, 3e-2)
    monkeypatch.setitem(TYPES, torch.float16, 4e-3)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_more_tokens_than_the_kernels_take(name: str, dtype: torch.dtype, rounded: None) -> None:
    assert neurons._kernel(case(name, "half", 9, dtype)[0], torch.ones(1, 1)) is None
    check(name, OPERATORS[name][0], dtype, (9, 40))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_without_a_compiler_torch_s_own_operators_give_the_reference(
    name: str, dtype: torch.dtype, threads: None, rounded: None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(neurons, "_native", lambda: None)
    check(name, OPERATORS[name][0], dtype, (1, 2, 8))


def test_the_references_are_the_definitions() -> None:
    kept_nan = neurons.active(torch.tensor([torch.nan, 1.0, -7.0]), torch.tensor(5.0))
    torch.testing.assert_close(kept_nan, torch.tensor([torch.nan, 0.0, -7.0]), equal_nan=True)
    act, x, up, up_bias, down, bias, threshold = case("gated_tail", "threshold", 3, torch.float64)
    kept = act * (act.abs() > threshold)
    torch.testing.assert_close(sparse_linear_reference(act, down, bias, threshold), kept @ down + bias)
    torch.testing.assert_close(
        gated_tail_reference(act, x, up, up_bias, down, bias, threshold), (kept * (x @ up.T + up_bias)) @ down + bias
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_leading_dimensions(dtype: torch.dtype) -> None:
    act, weight, bias, threshold = case("sparse_linear", "half", 6, dtype)
    flat = sparse_linear(act, weight, bias, threshold)
    assert torch.equal(sparse_linear(act.reshape(2, 3, -1), weight, bias, threshold), flat.view(2, 3, -1))
    assert torch.equal(
        sparse_linear(act[0], weight, bias, threshold), sparse_linear(act[:1], weight, bias, threshold)[0]
    )
    assert sparse_linear(act[:0], weight, bias, threshold).shape == (0, weight.shape[1])
    assert torch.equal(sparse_linear(act[:, :0], weight[:0], bias, threshold), bias.expand(6, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_special_numbers(dtype: torch.dtype) -> None:
    """NaN is active, an infinite weight of an inactive neuron is not read, and subnormal numbers are numbers."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    weight = torch.full((3, 19), tiny, dtype=dtype)
    weight[1] = torch.inf
    one = torch.tensor([[1.0, 0.0, 2.0]], dtype=dtype)
    found = sparse_linear(one, weight, None, torch.tensor(0.0))
    assert torch.equal(found, torch.full_like(found, tiny * 3))
    assert sparse_linear(one * 0 + torch.nan, weight, None, torch.tensor(5.0)).isnan().all()
    assert torch.equal(sparse_linear(one.flip(1) * 0 + 1, weight, None, torch.tensor(0.0)), found + torch.inf)
    weight[1] = torch.nan
    assert sparse_linear(one + 1, weight, None, torch.tensor(0.0)).isnan().all()
    assert torch.equal(gated_tail(one, one, weight[:, :3], None, weight, None, torch.tensor(9.0)), found * 0)


def test_a_number_of_threads_gives_one_result(threads: None) -> None:
    for name, (run, _) in OPERATORS.items():
        arguments = case(name, "half", 4, torch.float32)
        assert len({tuple(run(*arguments).flatten().tolist()) for _ in range(20)}) == 1


@pytest.mark.slow
def test_without_vector_instructions_too(monkeypatch: Any) -> None:
    monkeypatch.setattr(native, "INSTRUCTIONS", {})
    plain = native.library.__wrapped__("neurons")
    assert plain is not None
    plain.tokred_neurons.argtypes = neurons._native().argtypes
    monkeypatch.setattr(neurons, "_native", lambda: plain.tokred_neurons)
    for name, dtype in product(OPERATORS, (torch.float32, torch.bfloat16, torch.float16)):
        check(name, OPERATORS[name][0], dtype, (1, 2, 7))
    for dtype in (torch.bfloat16, torch.float16):
        test_special_numbers(dtype)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16).view(1, -1)
    one = torch.ones(1, 1, dtype=torch.float16)
    found = sparse_linear(one, every, None, torch.tensor(0.0))
    torch.testing.assert_close(found, every, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    "compiler, flags, reason",
    [
        (("no-such-compiler",), (), "No working C++ compiler"),
        (torch._inductor.config.cpp.cxx, ("--no-such-flag",), "--no-such-flag"),
    ],
)
def test_no_compiler_is_said_in_the_log(
    compiler: tuple[str, ...], flags: tuple[str, ...], reason: str, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(native, "FLAGS", flags)
    with torch._inductor.config.patch({"cpp.cxx": compiler}), caplog.at_level(logging.WARNING, "tokred"):
        assert native.library.__wrapped__("neurons") is None
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("neurons.cpp could not be compiled, a slower form runs instead: ") and reason in said


# -- as operators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operator_is_registered_as_it_should_be(name: str) -> None:
    torch.library.opcheck(OPERATORS[name][0], case(name, "half", 2, torch.float32))


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_are_those_of_the_masked_definition(name: str) -> None:
    for activity, dtype in product(("half", "threshold"), (torch.float64, torch.float32)):
        run, reference = OPERATORS[name]
        arguments = [
            x if x is None or x.dim() == 0 else x.clone().requires_grad_() for x in case(name, activity, 3, dtype)
        ]
        leaves = [x for x in arguments if x is not None and x.requires_grad]
        seed = torch.linspace(-1, 1, SIZES["odd"][1], dtype=torch.float64)
        wanted = torch.autograd.grad((reference(*arguments) * seed).sum(), leaves)
        found = torch.autograd.grad((run(*arguments) * seed).sum(), leaves)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b.to(dtype), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPERATORS)
def test_one_graph_serves_all_thresholds_and_numbers_of_active_neurons(name: str, backend: str) -> None:
    torch.compiler.reset()
    graphs = 0

    def counted(gm: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(gm, inputs)  # type: ignore[operator]

    run = OPERATORS[name][0]
    compiled = torch.compile(lambda act, *rest: run(act * 1, *rest) + 0, backend=counted, fullgraph=True)
    with torch.no_grad():
        for activity in ACTIVITY:
            arguments = case(name, activity, 2, torch.float32)
            assert gap(compiled(*arguments), name, arguments) < 3e-6
    assert graphs == 1
    torch.compiler.reset()


@pytest.mark.parametrize("name", OPERATORS)
def test_what_does_not_fit_is_an_error(name: str) -> None:
    arguments = case(name, "half", 2, torch.float32)
    mode = FakeTensorMode()
    for place, value in enumerate(arguments):
        if not value.dim():
            continue
        wider = value.repeat_interleave(2, -1)
        for wrong in (wider, wider.unsqueeze(0), value.bfloat16()):
            given = (*arguments[:place], wrong, *arguments[place + 1 :])
            for tensors in (given, [mode.from_tensor(x) for x in given]):  # a graph is refused when it is made
                with pytest.raises(ValueError, match=f"{name}: "):
                    OPERATORS[name][0](*tensors)
    if name == "gated_tail":
        with pytest.raises(ValueError, match=r"gated_tail: \[.. F\], \[.. C\]"):
            gated_tail(arguments[0], arguments[1][:1], *arguments[2:])
    with pytest.raises(ValueError, match="a single threshold"):
        OPERATORS[name][0](*arguments[:-1], torch.zeros(2))


# -- Triton -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_triton_kernels_give_the_reference() -> None:
    assert last_word("tests.backends.kernels.test_neurons") == "done"


class NoWait(TorchDispatchMode):
    """What a CUDA graph cannot record: a size or a number that the host reads from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        assert func not in waits and torch.Tag.data_dependent_output not in func.tags, func
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Through Triton's interpreter: it must be on before Triton is imported, hence a process of its own."""
    from tokred.backends.kernels import neurons_triton

    neurons_triton.PROGRAMS = 6  # several shares of few neurons
    for name, dtype in product(OPERATORS, TYPES):

        def run(*arguments: Any, name: str = name) -> Tensor:
            with NoWait():
                result: Tensor = getattr(neurons_triton, name)(*arguments)
                return result.to(arguments[0].dtype)

        check(name, run, dtype, (1, 2, 5, 8) if dtype == torch.float32 else (3,), every=False)
    SIZES["odd"] = (150, 270, 140)  # several blocks of each
    for name in OPERATORS:
        check(name, getattr(neurons_triton, name), torch.float32, (3,), every=False)
    print("done")


if __name__ == "__main__":
    main()
