"""vmap in Dynamo's graph: captured as the plain calls that it stands for, with the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compiler.graphs import captured
from tokred.compiler.vmaps import open_vmaps


def of_one_kind(kinds: Tensor, x: Tensor) -> Tensor:
    """As transformers masks images: [B N N], whether query and key are of one kind or the key is not later."""

    def see(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q.new_ones((), dtype=torch.bool) & ((k <= q) | (kinds[b, q] == kinds[b, k]))

    for dims in ((None, None, 0), (None, 0, None), (0, None, None)):
        see = torch.vmap(see, in_dims=dims)
    places = torch.arange(kinds.shape[1])
    return x.where(see(torch.arange(kinds.shape[0]), places, places), x.exp())


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_vmapped_mask_is_plain_calls(dynamic: bool) -> None:
    kinds, x = torch.tensor([[0, 1, 1, 2, 2], [3, 3, 3, 0, 1]]), torch.randn(2, 5, 5)
    if dynamic:
        torch._dynamo.mark_dynamic(kinds, 1)
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(x, 2)
    (graph,) = captured(of_one_kind, kinds, x)
    assert all(isinstance(n.target, torch._ops.OpOverload) for n in graph.graph.nodes if n.op == "call_function")
    tensors = {(2, 5): kinds, (2, 5, 5): x}
    values: list[Any] = []
    for node in graph.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        values.append(tensors[tuple(map(int, value.shape))] if isinstance(value, Tensor) else 5)
    assert torch.equal(graph(*values)[0], of_one_kind(kinds, x))


def test_each_result_of_a_vmap_is_its_own() -> None:
    x = torch.randn(3, 4)

    def function(x: Tensor) -> Tensor:
        first, second = torch.vmap(lambda row: (row.cumsum(0), row * 2))(x)
        return first - second

    (graph,) = captured(function, x)
    assert torch.equal(graph(x)[0], function(x))


def test_without_a_vmap_the_graph_itself_is_used() -> None:
    graphs = []

    def backend(gm: Any, inputs: list[Any]) -> Any:
        graphs.append((gm, open_vmaps(gm)))
        return gm

    torch.compiler.reset()
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert all(before is after for before, after in graphs) and graphs
