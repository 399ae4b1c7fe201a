"""drop_idle_dropout: remove dropout where it does nothing."""

import copy

import torch
from torch import fx

from tokred import register_pass

aten = torch.ops.aten


@register_pass("drop_idle_dropout", stage="exact", exact=True)
def drop_idle_dropout(graph: fx.GraphModule, log: list[str]) -> fx.GraphModule:
    """Let the users of `dropout(x, p, train)` read x, where train is False or p is 0. Exact: it is the identity there.

    A pass leaves its argument alone: tokred goes on with it where the pass fails. Each line of `log` is one change.
    """
    result = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in result.graph.find_nodes(op="call_function", target=aten.dropout.default):
        source, p, train = node.args
        if train and p != 0:
            continue
        node.replace_all_uses_with(source)
        result.graph.erase_node(node)
        log.append(f"{node.name} of {source.name}")
    if not log:
        return graph
    result.recompile()
    return result
