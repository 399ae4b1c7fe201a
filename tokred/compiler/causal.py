"""Is an attention causal? Its flag says so, or its mask: the mask's own small graph is run once, hiding nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokred.compiler.blocks import Attention
from tokred.compiler.capture import is_parameter, tensor_meta
from tokred.compiler.graphs import ancestors
from tokred.compiler.residual import CONTRACTIONS

__all__ = ["hides_earlier_keys", "is_causal"]

LARGEST = 2**22  # elements of a mask that is worth running


def is_causal(block: Attention) -> bool:
    """Whether some query may not see a later key that an earlier key's query may see.

    A mask computed from activations (a decomposed position bias) cannot tell and does not hide keys: not causal. A mask
    that is an input of the graph cannot be looked into: causal unless it is the same for all queries.
    """
    return block.causal or any(_hides_later_keys(mask) for mask in block.masks)


def hides_earlier_keys(block: Attention) -> bool:
    """Whether a mask is known to hide keys that are neither later than the query nor padding, or to weigh keys."""
    return any(_facts(mask)[1] for mask in block.masks)


def _hides_later_keys(mask: fx.Node) -> bool:
    return _facts(mask)[0]


def _facts(mask: fx.Node) -> tuple[bool, bool]:
    """Whether a mask hides later keys, and whether it is known to hide or to weigh others."""
    meta = tensor_meta(mask)
    if meta is None or meta.dim() < 2 or _is_one(meta.shape[-2]) or _is_one(meta.shape[-1]):
        return False, False
    if "hides_keys" not in mask.meta:
        mask.meta["hides_keys"] = _inspect(mask)
    found: tuple[bool, bool] = mask.meta["hides_keys"]
    return found


def _inspect(mask: fx.Node) -> tuple[bool, bool]:
    nodes = ancestors([mask])
    if mask.op == "placeholder":
        return not is_parameter(mask), False
    if any(node.target in CONTRACTIONS for node in nodes):
        return False, False
    try:
        return _look(mask, nodes)
    except Exception:
        return True, False  # what cannot be looked into is taken for the stricter case


def _look(mask: fx.Node, nodes: list[fx.Node]) -> tuple[bool, bool]:
    """Run the mask on inputs that hide nothing, and with each input of integers zero: which kind a token is (image or
    word) may decide what it sees. Where each query still sees its own key, later keys hidden from all are hidden.
    """
    value = _run(mask, nodes, 0)
    if not value.numel():  # images of zeros may be no images
        value = _run(mask, nodes, 1)
    seen = _seen(value)
    rows, columns = seen.shape[-2:]
    later = torch.ones(rows, columns, dtype=torch.bool).triu(1 + columns - rows)
    weighs = value.dtype != torch.bool and bool((value.reshape(seen.shape)[seen] != 0).any())
    pairs = seen.any(0)
    causal = not bool(pairs[later].any())
    for kind in (node for node in nodes if node.op == "placeholder" and _counts(node.meta["val"])):
        other = _seen(_run(mask, nodes, 0, {kind: 0}))
        if other.numel() and other.diagonal(columns - rows, -2, -1).all():
            causal |= not bool(other.any(0)[later].any())
    return causal and bool(later.any()), weighs or not bool(pairs[~later].all())


def _seen(value: torch.Tensor) -> torch.Tensor:
    """[S N M] which keys the queries see."""
    value = value[None].flatten(0, -3)
    return value if value.dtype == torch.bool else value > torch.finfo(value.dtype).min / 2


def _counts(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.dtype.is_floating_point


def _run(mask: fx.Node, nodes: list[fx.Node], floats: int, given: dict[fx.Node, int] | None = None) -> torch.Tensor:
    """The mask for inputs filled with ones if they are integers or booleans, `floats` if not, or what is `given`."""
    env: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in nodes:
            if node.op in ("placeholder", "get_attr"):
                value = node.meta["val"]
                env[node] = _filled(value, (given or {}).get(node, 1 if _counts(value) else floats))
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})  # type: ignore[operator]
    result: torch.Tensor = env[mask]
    return result


def _filled(value: Any, fill: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value if isinstance(value, (int, float, bool)) else int(value.node.hint)
    shape = [size if isinstance(size, int) else int(size.node.hint) for size in value.shape]
    if torch.Size(shape).numel() > LARGEST:
        raise ValueError("too large to look into")
    return torch.full(shape, fill, dtype=value.dtype)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
