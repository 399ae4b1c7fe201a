"""Skip the neurons that ReLU left at exactly zero, where few tokens make reading weights the work.

`fc2(relu(fc1 x))` becomes tokred::sparse_linear with threshold 0: the same sum without the terms that are zero. Which
those are only the data tell, so whether it pays is an expectation: that half of the neurons are zero for a token, as in
a model that was never trained; in trained ones more are (Mirzadeh et al., ReLU Strikes Back, arXiv 2310.04564). Where
none is zero the operator takes about as long as the product that it replaces. What it costs for certain is memory: a
second, neuron-major copy of fc2's weight, shared by all graphs (tokred.compiler.relaid).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from tokred.backends.kernels.neurons import TOKENS, TYPES, sparse_linear
from tokred.compiler.capture import autocasts, is_parameter, module_path, source_line, tensor_meta
from tokred.compiler.machine import Machine
from tokred.compiler.relaid import erase_unused_copies, relaid_input, untracked, values_of
from tokred.compiler.relations import Op
from tokred.passes.constants import CASTS
from tokred.passes.graph_edit import copy_graph, erase_unused, inherit
from tokred.passes.indices import SAME, VIEWS

__all__ = ["relu_exact"]

aten = torch.ops.aten

ZEROS = 0.5  # of the neurons, for one token
CALL = 5  # kernels that one call of the operator costs: 20 to 45 microseconds measured, of 10 each
POWERS = {aten.pow.Tensor_Scalar, aten.square.default}
THROUGH = VIEWS | SAME | CASTS | POWERS | {aten.dropout.default}


def relu_exact(gm: fx.GraphModule, log: list[str], inputs: list[Any]) -> fx.GraphModule:
    """Replace products of up to eight rows behind a ReLU; `inputs` are the graph's, parameters among them.

    Not where a gradient is wanted, and not where what half of the neurons' weights take to read is less than a call.
    """
    parameters = values_of(gm, inputs)
    if not any(_pays(node, parameters) for node in gm.graph.nodes):
        return gm
    gm = copy_graph(gm)
    parameters = values_of(gm, inputs)
    zero: fx.Node | None = None
    before = {node for node in gm.graph.nodes if not node.users}
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        if not _pays(node, parameters):
            continue
        op = Op(node)
        x, weight, bias = op.operand("input"), op.operand("weight"), op.arguments.get("bias")
        fake = node.meta["val"]
        with gm.graph.inserting_before(node):
            if zero is None:
                zero = gm.graph.call_function(aten.zeros.default, ([],), {"device": fake.device})
                with fake.fake_mode:
                    zero.meta["val"] = torch.zeros([], device=fake.device)
            copy = relaid_input(gm.graph, weight)
            new = gm.graph.call_function(sparse_linear, (x, copy, bias, zero))
        new.meta["val"] = fake
        inherit([new], node)
        node.replace_all_uses_with(new)
        size = copy.meta["val"].nbytes
        where = module_path(node) or source_line(node)
        log.append(f"{where}: zeros of the ReLU are skipped; its weight is held a second time, {size / 2**20:.1f} MB")
    erase_unused(gm.graph, before)
    erase_unused_copies(gm.graph)
    gm.recompile()
    return gm


def _pays(node: fx.Node, parameters: dict[fx.Node, Any]) -> bool:
    """Whether this is a product of a few rows behind a ReLU, large enough, whose weight may be relaid."""
    result = tensor_meta(node)
    if node.target is not aten.linear.default or result is None or result.dtype not in TYPES:
        return False
    op = Op(node)
    weight, parameter = op.operand("weight"), parameters.get(op.operand("weight"))
    if not all(isinstance(size, int) for size in result.shape):  # a comparison would fix a run-time size
        return False
    rows = prod(result.shape[:-1])
    if not 1 <= rows <= TOKENS or not _behind_relu(op.operand("input")) or autocasts(node):
        return False
    if not is_parameter(weight) or parameter is None or parameter.dim() != 2 or untracked(parameter):
        return False
    machine = Machine.of(result.device)
    return bool(ZEROS**rows * parameter.nbytes / machine.bandwidth > CALL * machine.kernel)


def _behind_relu(node: Any) -> bool:
    """Whether zeros of a ReLU are still zeros here: behind views, casts, powers and products with anything."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if node.target is aten.relu.default:
        return True
    if node.target is aten.mul.Tensor:
        return any(_behind_relu(factor) for factor in node.args)
    if node.target is aten.pow.Tensor_Scalar and not (isinstance(node.args[1], (int, float)) and node.args[1] > 0):
        return False
    return node.target in THROUGH and _behind_relu(node.args[0])
