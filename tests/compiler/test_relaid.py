"""Relaid parameters: one copy for all graphs, right again after each kind of change, gone with the parameter."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokred.backends.kernels.neurons import sparse_linear
from tokred.compiler import relaid
from tokred.compiler.capture import capture
from tokred.compiler.extras import extras_of, with_extras
from tokred.compiler.relaid import Relaid, RelaidInput, neuron_major, relaid_input, untracked
from tokred.passes.graph_edit import copy_graph

aten = torch.ops.aten


def relaid_backend(gm: Any, inputs: list[Any]) -> Any:
    """Every linear with a weight that may be relaid, as sparse_linear with threshold 0."""
    captured = capture(gm, inputs)
    graph = captured.graph
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        x, weight, *bias = node.args
        with graph.inserting_before(node):
            none = graph.call_function(aten.zeros.default, ([],))
            arguments = (x, relaid_input(graph, weight), bias[0] if bias else None, none)
            new = graph.call_function(torch.ops.tokred.sparse_linear.default, arguments)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    captured.recompile()
    backend.numbers = [extra.numbers for extra in extras_of(captured) if isinstance(extra, RelaidInput)]
    return with_extras(captured.forward, captured)


class backend:  # what the last compilation saw
    numbers: Any = ()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu()) + self.second(self.first(x + 1).relu())
        return y


def step(net: nn.Module) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with torch.enable_grad():
        net(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()


def rebind(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data = parameter.data * 2


CHANGES = {
    "load_state_dict": lambda net: net.load_state_dict(Net().state_dict()),
    "assign": lambda net: net.load_state_dict(Net().state_dict(), assign=True),
    "optimiser": step,
    "data": rebind,
    "in place": lambda net: torch.nn.init.normal_(net.second.weight),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_compiled_model_follows_its_parameters(change: str, monkeypatch: Any) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(relaid, "_glimpse", lambda parameter: [])  # as on CUDA
    torch.manual_seed(0)
    net, x = Net(), torch.randn(1, 6)
    compiled = torch.compile(net, backend=relaid_backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))
        assert len(backend.numbers) == 2  # each weight has two uses, and one copy
        before = net(x)
        CHANGES[change](net)
        assert not torch.allclose(net(x), before)
        torch.testing.assert_close(compiled(x), net(x))
    torch.compiler.reset()


def test_one_copy_serves_all_and_goes_with_its_parameter() -> None:
    gc.collect()
    start = Relaid.total()
    weight = nn.Parameter(torch.randn(3, 4))
    with torch.no_grad():
        copy = Relaid.of(weight)
        assert Relaid.of(weight) is copy and copy.is_contiguous() and torch.equal(copy, weight.T)
        assert Relaid.total() - start == 48
        address = copy.data_ptr()
        weight.mul_(2)
        assert Relaid.of(weight) is copy and copy.data_ptr() == address and torch.equal(copy, weight.T)
        weight.data = torch.randn(3, 5)
        assert torch.equal(Relaid.of(weight), weight.T) and Relaid.total() - start == 60
    del weight
    gc.collect()
    assert Relaid.total() == start


def merged(weight: nn.Parameter) -> None:
    """As PEFT merges LoRA branches: the same memory, and no new version."""
    weight.data += torch.randn(40, 1) @ torch.randn(1, 40)


def loaded_again(weight: nn.Parameter) -> None:
    """As offloading does; what is loaded often lies where the weight was."""
    weight.data = torch.empty(0)
    weight.data = torch.randn(40, 40)


def turned(weight: nn.Parameter) -> None:
    weight.data = weight.data.T


@pytest.mark.parametrize("change", [lambda weight: weight.data.mul_(2), merged, loaded_again, turned])
def test_what_leaves_no_trace_but_other_numbers_is_seen(change: Any) -> None:
    weight = nn.Parameter(torch.randn(40, 40), requires_grad=False)
    Relaid.of(weight)
    change(weight)
    assert torch.equal(Relaid.of(weight), weight.T)


def test_a_number_written_through_data_is_seen_by_graphs_made_afterwards() -> None:
    weight, x = nn.Parameter(torch.randn(40, 40), requires_grad=False), torch.randn(1, 40)

    def made() -> Any:
        extra = RelaidInput((1,), neuron_major)
        return lambda x, w: sparse_linear(x, *extra.give((x, w)), None, torch.tensor(0.0))

    before = made()
    torch.testing.assert_close(before(x, weight), x @ weight.T)
    weight.data[7, 3] += 1  # neither among the first numbers nor in the middle
    assert not torch.allclose(before(x, weight), x @ weight.T)
    torch.testing.assert_close(made()(x, weight), x @ weight.T)
    weight.data[7, 3] += 1
    Relaid.forget()
    torch.testing.assert_close(before(x, weight), x @ weight.T)


def test_a_copy_counts_as_made_when_it_is_whole(monkeypatch: Any) -> None:
    """Another thread that looks while it is made, or the next call if that failed, makes it again."""
    weight = nn.Parameter(torch.randn(3, 4), requires_grad=False)
    copy, seen = Relaid.of(weight), []

    def failing(self: Tensor, source: Tensor) -> Tensor:
        seen.append(Relaid._all[neuron_major, id(weight)].fits(weight))
        raise MemoryError

    weight.mul_(2)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", failing)
        with pytest.raises(MemoryError):
            Relaid.of(weight)
    assert seen == [False]
    assert Relaid.of(weight) is copy and torch.equal(copy, weight.T)


def test_layouts() -> None:
    assert neuron_major(torch.ones(3, 4)).shape == (4, 3)
    assert neuron_major(torch.ones(3, 4, 1, 1)).shape == (4, 3)
    assert neuron_major(torch.ones(2, 3, 4)).shape == (2, 4, 3)


def test_what_cannot_be_followed_is_refused() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    assert "gradient" in untracked(weight)
    with pytest.raises(ValueError, match=r"no copy of this \(3, 4\) parameter: the weight's gradient is wanted"):
        Relaid.of(weight)
    with torch.inference_mode():
        made = torch.randn(3, 4)
    with pytest.raises(ValueError, match="inference_mode"):
        Relaid.of(made)
    with torch.inference_mode():
        assert torch.equal(Relaid.of(weight), weight.T)  # the parameter itself is an ordinary one
    assert not Relaid.of(weight.detach()).requires_grad


def test_a_wrapped_call_looks_at_each_parameter_it_gets() -> None:
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    x = torch.randn(1, 4)
    extra = RelaidInput((1,), neuron_major)
    for weight in (first, second, first):
        (copy,) = extra.give([x, weight])
        torch.testing.assert_close(sparse_linear(x, copy, None, torch.tensor(0.0)), x @ weight.T)


def test_a_copied_graph_keeps_its_relaid_inputs() -> None:
    torch.compiler.reset()

    def look(gm: Any, inputs: list[Any]) -> Any:
        captured = capture(gm, inputs)
        weight = captured.graph.find_nodes(op="call_function", target=aten.linear.default)[0].args[1]
        added = relaid_input(captured.graph, weight)
        assert relaid_input(captured.graph, weight) is added
        assert added.meta["val"].shape == weight.meta["val"].T.shape and added.meta["val"].is_contiguous()
        with pytest.raises(ValueError):
            relaid_input(captured.graph, captured.graph.output_node())
        found = extras_of(captured)
        assert len(found) == 1 and extras_of(copy_graph(captured)) == found
        return gm.forward

    with torch.no_grad():
        torch.compile(nn.Linear(4, 3), backend=look)(torch.randn(2, 4))
    torch.compiler.reset()
