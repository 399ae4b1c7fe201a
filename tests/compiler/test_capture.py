"""Capture: what the graph that everything else reads may rely on."""

import torch
from torch import Tensor, nn

from tests.compiler.graphs import captured

aten = torch.ops.aten


class Merge(nn.Module):
    """What every model does behind its attention."""

    def forward(self, x: Tensor) -> Tensor:
        batch, _, rows, _ = x.shape
        return x.transpose(1, 2).view(batch, rows, -1)


def test_a_view_that_was_legal_for_one_kernel_runs_behind_another() -> None:
    rows_first = torch.randn(2, 5, 3, 4).transpose(1, 2)  # [B H N D] as a flash kernel leaves it: `view` is legal
    (graph,) = captured(Merge(), rows_first)
    assert aten.view.default not in {node.target for node in graph.graph.nodes}
    heads_first = rows_first.contiguous()  # as the math kernel leaves it: `view` would raise
    assert torch.equal(graph(heads_first)[0], Merge()(rows_first))


class Append(nn.Module):
    """A key that is appended to an empty cache."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.tensor([], dtype=x.dtype), x.transpose(0, 1)], dim=-2)


def test_appending_to_an_empty_cache_is_a_copy() -> None:
    x = torch.randn(4, 3, 2)
    (graph,) = captured(Append(), x)
    assert aten.cat.default not in {node.target for node in graph.graph.nodes}
    (result,) = graph(x)
    assert torch.equal(result, Append()(x))
    assert result.is_contiguous()
