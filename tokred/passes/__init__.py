"""The passes, in the order in which they run: each takes a graph and its log and returns a graph."""

from __future__ import annotations

from typing import Any

import networkx as nx

from tokred.passes.canonical_attention import canonical_attention
from tokred.passes.drop_dead_tokens import drop_dead_tokens
from tokred.passes.shield_softmax import shield_softmax
from tokred.registry.register import passes

__all__ = ["exact_passes", "plugin_passes"]

Pass = tuple[str, bool, Any]


def exact_passes(options: Any) -> list[Pass]:
    """Same numbers, less work. On by default."""
    chosen: list[Pass] = []
    if options.exact:
        chosen += [("canonical_attention", True, canonical_attention), ("drop_dead_tokens", True, drop_dead_tokens)]
    if options.lower == "inductor":
        chosen.append(("shield_softmax", True, shield_softmax))
    return chosen


def plugin_passes(stage: str, options: Any) -> list[Pass]:
    """Registered passes of a stage in an order that respects `before` and `after`; lossy ones only if named."""
    chosen = {
        name: spec
        for name, spec in passes().items()
        if spec.stage == stage and ((spec.exact and options.exact) or name in options.passes)
    }
    order: Any = nx.DiGraph()
    order.add_nodes_from(chosen)
    for name, spec in chosen.items():
        order.add_edges_from((name, other) for other in spec.before if other in chosen)
        order.add_edges_from((other, name) for other in spec.after if other in chosen)
    return [(name, chosen[name].exact, chosen[name].run) for name in nx.lexicographical_topological_sort(order)]
