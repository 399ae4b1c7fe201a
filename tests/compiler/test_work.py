"""FLOPs and bytes of single nodes against formulas worked by hand, and of whole models against torch's own counter."""

from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.compiler.graphs import captured
from tests.zoo.architecture import tensors_of
from tests.zoo.architectures import ARCHITECTURES
from tokred.backends.kernels.learners import nested_learners
from tokred.backends.kernels.neurons import gated_tail, sparse_linear
from tokred.compiler.axes import Axes
from tokred.compiler.blocks import Blocks, find_blocks
from tokred.compiler.symbolic import expression
from tokred.compiler.work import flops, moved, weights
from tokred.testing.models import TinyViT


def counted(function: Any, *inputs: Tensor) -> int:
    traced = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)
    return sum(flops(node) for node in traced.graph.nodes)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def grouped(q: Tensor, k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)


def causal(q: Tensor, k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, k, is_causal=True)


def learners(x: Tensor, up: Tensor, up_bias: Tensor, down_bias: Tensor) -> Any:
    return nested_learners(x, torch.zeros(7, dtype=torch.long), up, up_bias, up, down_bias, "relu")


r = torch.randn


@pytest.mark.parametrize(
    "function, inputs, expected",
    [
        (F.linear, (r(2, 5, 3), r(7, 3), r(7)), 2 * 2 * 5 * 3 * 7),
        (torch.mm, (r(5, 3), r(3, 7)), 2 * 5 * 3 * 7),
        (torch.addmm, (r(7), r(5, 3), r(3, 7)), 2 * 5 * 3 * 7),
        (torch.bmm, (r(4, 5, 3), r(4, 3, 7)), 2 * 4 * 5 * 3 * 7),
        (torch.baddbmm, (r(4, 5, 7), r(4, 5, 3), r(4, 3, 7)), 2 * 4 * 5 * 3 * 7),
        (torch.matmul, (r(6, 1, 5, 3), r(4, 3, 7)), 2 * 6 * 4 * 5 * 3 * 7),  # both batches are broadcast
        (torch.matmul, (r(5, 3), r(3)), 2 * 5 * 3),
        (F.conv2d, (r(2, 6, 9, 9), r(8, 3, 3, 3), None, 2, 1, 1, 2), 2 * 2 * 8 * 5 * 5 * 3 * 9),  # two groups
        (F.conv1d, (r(2, 6, 9), r(8, 6, 3)), 2 * 2 * 8 * 7 * 6 * 3),
        (F.conv_transpose2d, (r(2, 6, 9, 9), r(6, 8, 2, 2), None, 2), 2 * 2 * 6 * 81 * 8 * 4),
        (attention, (r(2, 4, 5, 3), r(2, 4, 7, 3), r(2, 4, 7, 6)), 2 * 2 * 4 * 5 * 7 * (3 + 6)),
        (grouped, (r(2, 4, 5, 3), r(2, 2, 7, 3)), 2 * 2 * 4 * 5 * 7 * 6),
        (causal, (r(2, 4, 5, 3), r(2, 4, 5, 3)), 2 * 2 * 4 * 15 * 6),  # 1 + .. + 5 pairs
        (learners, (r(7, 5), r(3, 4, 5), r(3, 4), r(3, 5)), 2 * 7 * 3 * 4 * (5 + 5)),  # all of them
        (causal, (r(1, 1, 5, 3), r(1, 1, 2, 3)), 2 * 9 * 6),  # 1 + 2 + 2 + 2 + 2
        (causal, (r(1, 1, 2, 3), r(1, 1, 5, 3)), 2 * 3 * 6),  # 1 + 2
        (lambda x: torch.relu(x).softmax(-1).sum(0), (r(5, 3),), 0),
    ],
)
def test_flops_by_hand(function: Any, inputs: Any, expected: int) -> None:
    assert counted(lambda *tensors: function(*_merged(inputs, tensors)), *_tensors(inputs)) == expected


def _tensors(inputs: Any) -> list[Tensor]:
    return [value for value in inputs if isinstance(value, Tensor)]


def _merged(inputs: Any, tensors: Any) -> list[Any]:
    rest = iter(tensors)
    return [next(rest) if isinstance(value, Tensor) else value for value in inputs]


@pytest.mark.parametrize(
    "equation, shapes, expected",
    [
        ("bnhd,bmhd->bhnm", [(2, 5, 4, 3), (2, 7, 4, 3)], 2 * 2 * 4 * 5 * 7 * 3),
        ("...ij,...jk->...ik", [(2, 4, 5, 3), (2, 4, 3, 7)], 2 * 2 * 4 * 5 * 3 * 7),
        ("ab,bc,cd->ad", [(2, 3), (3, 5), (5, 7)], 2 * 2 * 3 * 5 + 2 * 2 * 5 * 7),
    ],
)
def test_einsum_counts_each_contraction(equation: str, shapes: list[tuple[int, ...]], expected: int) -> None:
    operands = [r(*shape) for shape in shapes]
    (graph,) = captured(lambda *given: torch.einsum(equation, *given), *operands)
    assert torch.ops.aten.einsum.default in {node.target for node in graph.graph.nodes}
    assert sum(flops(node) for node in graph.graph.nodes) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "vit",  # SDPA
        "bert_padded",
        "timm_xcit",  # attention over channels, convolutions
        "nn_einsum",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit_eager", "siglip2_vision", "timm_swin")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("segformer", "dpt", "sd_unet")),
    ],
)
def test_totals_equal_the_flop_counter(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.model(), architecture.example()
    graphs = captured(model, **inputs) if name in SEEN else [traced(model, inputs)]
    ours = sum(flops(node) for graph in graphs for node in graph.graph.nodes)
    assert ours == _counter(model, inputs)


SEEN = ("vit", "bert_padded", "nn_einsum", "siglip2_vision")


def traced(model: nn.Module, inputs: dict[str, Any]) -> fx.GraphModule:
    """The same operations as tokred sees, without Dynamo, which takes seconds for a large model."""

    def function(*values: Any) -> Any:
        return tensors_of(model(**dict(zip(inputs, values, strict=True))))

    with torch.no_grad():
        return make_fx(function, pre_dispatch=True)(*inputs.values())


def test_causal_attention_counts_only_the_triangle() -> None:
    """torch's counter counts what the mask hides as well."""
    q = r(2, 4, 5, 3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        causal(q, q)
    assert counted(causal, q, q) == counter.get_total_flops() - 4 * 2 * 4 * 3 * (1 + 2 + 3 + 4)


def _counter(model: nn.Module, inputs: dict[str, Any]) -> int:
    """torch's counter knows no CPU flash attention, so attention is spelled out."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def test_bytes_are_counted_once_for_a_fused_chain() -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.relu(F.linear(x, weight) * 2 + 1)  # one product, one fused kernel

    graph = make_fx(function, tracing_mode="fake", pre_dispatch=True)(r(5, 3), r(7, 3))
    total = sum(moved(node) for node in graph.graph.nodes)
    assert total == 4 * ((15 + 21 + 35) + (35 + 35))  # the weight is an input here, no parameter


def test_parameters_are_counted_apart() -> None:
    (graph,) = captured(nn.Linear(3, 7), r(5, 3))
    (linear,) = [node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert moved(linear) == 4 * (15 + 35)
    assert weights(linear) == 4 * (21 + 7)


# -- formulas ---------------------------------------------------------------------------------------------------------


def analysed(model: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, Axes, Blocks]:
    (graph,) = captured(model, *inputs)
    axes = Axes(graph.graph)
    return graph, axes, find_blocks(graph, axes)


B, C, D, F_, H, N = sympy.symbols("B C D F H N", integer=True, positive=True)


def test_formulas_are_the_textbook_ones() -> None:
    graph, axes, blocks = analysed(TinyViT().eval(), r(2, 3, 12, 12))
    formulas = expression(graph, axes, blocks)
    for mlp in blocks.mlps:
        (mlp_flops,) = formulas[mlp].flops.values()
        assert sympy.expand(mlp_flops - 4 * B * N * C * F_) == 0
        assert sympy.expand(formulas[mlp].weights - 4 * (2 * C * F_ + F_ + C)) == 0
        assert formulas[mlp].values == {N: 37, B: 2, C: 32, D: 8, H: 4, F_: 64}


def test_attention_is_quadratic_in_tokens_and_linear_elsewhere() -> None:
    model = ARCHITECTURES["vit"]
    (graph,) = captured(model.model(), **model.example())
    axes = Axes(graph.graph)
    blocks = find_blocks(graph, axes)
    formulas = expression(graph, axes, blocks)
    for block in blocks.attentions:
        (found,) = formulas[block].flops.values()
        textbook = 8 * B * N * C * H * D + 4 * B * H * D * N**2
        assert sympy.expand((found - textbook).subs(D, 16)) == 0  # the channels of v are an index of their own
        half = formulas[block].at(N=25)
        assert half.flops[torch.float32] == float(found.subs(formulas[block].values | {N: 25}))
    per_block = sum(sum(formula.at().flops.values()) for formula in formulas.values())
    assert per_block < sum(flops(node) for node in graph.graph.nodes)


@pytest.mark.slow
def test_a_symbolic_batch_stays_a_symbol_and_numbers_come_from_its_hint() -> None:
    x = r(6, 3, 12, 12)
    model = TinyViT().eval()
    fixed, *_ = analysed(model, x)
    torch._dynamo.mark_dynamic(x, 0)
    graph, axes, blocks = analysed(model, x)
    assert isinstance(graph.graph.find_nodes(op="output")[0].args[0][0].meta["val"].shape[0], torch.SymInt)
    formulas = expression(graph, axes, blocks)
    (found,) = formulas[blocks.mlps[0]].flops.values()
    assert sympy.expand(found - 4 * B * N * C * F_) == 0
    assert formulas[blocks.mlps[0]].values[B] == 6
    assert sum(map(flops, graph.graph.nodes)) == sum(map(flops, fixed.graph.nodes))


# -- sparse products --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [1.0, 0.25])
def test_sparse_products_count_the_neurons_that_are_expected_to_be_active(active: float) -> None:
    threshold = torch.tensor(0.0)
    cases = [
        (sparse_linear, (r(2, 5, 8), r(8, 3), None, threshold), 2 * 2 * 5 * 8 * 3),
        (gated_tail, (r(2, 5, 8), r(2, 5, 7), r(8, 7), None, r(8, 3), r(3), threshold), 2 * 2 * 5 * 8 * (7 + 3)),
    ]
    for operator, inputs, expected in cases:
        traced = make_fx(lambda *tensors, op=operator: op(*tensors), tracing_mode="fake", pre_dispatch=True)(*inputs)
        (node,) = traced.graph.find_nodes(op="call_function", target=operator)
        node.meta["active"] = active
        assert flops(node) == int(expected * active)
        assert isinstance(flops(node), int)
        formula = flops(node, lambda n: [N if size == 5 else size for size in n.meta["val"].shape])
        assert sympy.expand(formula - expected * active * N / 5) == 0
