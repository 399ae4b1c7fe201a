"""Checks of one plan: the token map that a method returns for a site, against dense matrices in float64."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tokred.registry.maps import TokenMap
from tokred.registry.method import Reduction
from tokred.registry.site import Site
from tokred.testing.sites import make_site, places

__all__ = ["check_map", "check_plan"]

EXACT = 1e-10  # float64: rounding only


def check_plan(method: Reduction, site: Site) -> TokenMap:
    """Plan twice at `site` and check the map: kind, count, protected rows, order, types, gradients. Returns the map."""
    where = f"{method} at {_describe(site)}"
    before = [leaf.clone() for leaf in _tensors(site)]
    token_map = method.plan(site)
    assert isinstance(token_map, TokenMap), f"{where}: plan() returned {type(token_map).__name__}, not a TokenMap"
    again = method.plan(site)
    for old, now in zip(before, _tensors(site), strict=True):
        assert torch.equal(old, now), f"{where}: plan() changed one of its inputs in place"
    leaves = tree_leaves(token_map)
    kind = type(token_map).__name__
    assert leaves[0] is not token_map, f"{where}: a {kind} is no pytree; register it, as tokred/registry/maps.py does"
    for first, second in zip(leaves, tree_leaves(again), strict=True):
        same = torch.equal(first, second) if isinstance(first, Tensor) else first == second
        assert same, f"{where}: two plans from the same inputs differ; use no random state"
    hidden = site.hidden.clone().requires_grad_()
    reduced = token_map.reduce(hidden)
    kept = site.tokens - int(method.removed(site))
    assert reduced.shape == (site.batch, kept, hidden.shape[-1]), (
        f"{where}: removed() promises {kept} tokens, the map gives {list(reduced.shape)}"
    )
    assert reduced.dtype == hidden.dtype, f"{where}: the map turns {hidden.dtype} into {reduced.dtype}"
    _check_protected(where, site, token_map, reduced.detach())
    if method.causal_safe:
        _check_order(where, site, token_map)
    elif method.merges and site.inside is not None:
        places = torch.arange(site.tokens, dtype=torch.float64).expand(site.batch, -1).unsqueeze(-1)
        ascending = (token_map.pick(places).squeeze(-1).diff(dim=1) > 0).all()
        assert ascending, f"{where}: merges image tokens in a causal model, but rows change their order"
    (gradient,) = torch.autograd.grad(reduced.float().square().sum(), hidden)
    assert gradient.isfinite().all(), f"{where}: gradients are not finite"
    return token_map


def check_map(token_map: TokenMap, site: Site, *, averages: bool = True, where: str = "the map") -> None:
    """The algebra of a map over float64 rows: reduce, restore, pull and window agree with dense matrices.

    averages   whether a reduced constant is that constant
    """
    x, batch, tokens = site.hidden, site.batch, site.tokens
    reduced = token_map.reduce(x)
    kept = reduced.shape[1]
    if token_map.linear:
        dense = token_map.reduce(torch.eye(tokens, dtype=x.dtype).expand(batch, -1, -1))  # [B K N]
        _close(dense @ x, reduced, f"{where}: reduce(x) is not reduce(identity) @ x")
        assert (dense >= 0).all(), f"{where}: reduce has a negative weight"
    if averages:
        ones = torch.ones_like(x) if site.valid is None else site.valid.to(x.dtype).unsqueeze(-1).expand_as(x)
        alive = token_map.any(ones > 0).to(x.dtype)  # a group made of padding alone is nothing
        _close(token_map.reduce(ones) * alive, alive, f"{where}: a reduced constant is not that constant")
    assert token_map.pick(x).shape == reduced.shape, (
        f"{where}: pick gives {token_map.pick(x).shape[1]} rows, not {kept}"
    )
    _check_restore(token_map, x, reduced, where)
    size = token_map.sizes
    if size is not None:
        _close(size.sum(1), site.sizes().sum(1), f"{where}: the sizes do not add up to the tokens there were")
    groups = token_map.groups(tokens)
    assert groups.shape == (batch, tokens), f"{where}: groups() has shape {list(groups.shape)}"
    assert ((groups >= -1) & (groups < kept)).all(), f"{where}: groups() names a row that does not exist"
    _check_windows(token_map, site, reduced, where)


def check_plans(method: Reduction) -> int:
    """check_plan and check_map at all kinds of sites, in three types, for one sample and several; how many sites."""
    acted = 0
    for place in places(method):
        if not method.removed(place):
            continue
        acted += 1
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for batch in (1, 3):
                check_plan(method, make_site(place, batch=batch, dtype=dtype))
        for padded, sized in ((False, False), (True, False), (False, True), (True, True)):
            site = make_site(place, dtype=torch.float64, padded=padded, sized=sized)
            token_map = check_plan(method, site)
            where = f"{method} at {_describe(site)}"
            check_map(token_map, site, averages=method.averages, where=where)
            _check_alone(method, site, token_map, where)
    return acted


def _check_protected(where: str, site: Site, token_map: TokenMap, reduced: Tensor) -> None:
    kept = reduced.shape[1]
    if site.inside is not None:
        groups = token_map.groups(site.tokens)
        assert ((groups >= 0) | site.inside).all(), f"{where}: rows outside the visual span are protected and must stay"
        text = ~site.inside
        same = torch.equal(reduced.gather(1, _wide(groups.clamp(min=0), reduced))[text], site.hidden[text])
        assert same, f"{where}: rows outside the visual span are protected and must stay as they are"
    assert torch.equal(reduced[:, : site.head], site.hidden[:, : site.head]), (
        f"{where}: the first {site.head} rows are protected and must stay first, as they are"
    )
    assert torch.equal(reduced[:, kept - site.tail :], site.hidden[:, site.tokens - site.tail :]), (
        f"{where}: the last {site.tail} rows are protected and must stay last, as they are"
    )


def _check_order(where: str, site: Site, token_map: TokenMap) -> None:
    places = torch.arange(1, site.tokens + 1, dtype=torch.float64)
    mixed = token_map.reduce(torch.eye(site.tokens, dtype=torch.float64).expand(site.batch, -1, -1))  # [B K N]
    one_each = ((mixed != 0).sum(-1) == 1).all() and (mixed.sum(-1) == 1).all()
    assert one_each, f"{where}: causal_safe, but rows are mixed"
    assert ((mixed @ places).diff(dim=1) > 0).all(), f"{where}: causal_safe, but rows change their order"


def _check_restore(token_map: TokenMap, x: Tensor, reduced: Tensor, where: str) -> None:
    batch, tokens, kept = x.shape[0], x.shape[1], reduced.shape[1]
    weight = torch.linspace(0.5, 2, tokens, dtype=x.dtype).expand(batch, -1)
    pulled = token_map.pull(weight)
    if not token_map.restorable:
        back = token_map.restore(token_map.pick(x), x)
        assert torch.equal(back, x), f"{where}: rows put back over their stale selves differ"
        moved = (token_map.restore(reduced + 1, x) != x).any(-1).sum(1)
        assert (moved == kept).all(), f"{where}: restore writes other rows than the {kept} that were kept"
        return
    matrix = token_map.restore(torch.eye(kept, dtype=x.dtype).expand(batch, -1, -1), None)  # [B N K]
    _close(matrix @ reduced, token_map.restore(reduced, None), f"{where}: restore(y) is not restore(identity) @ y")
    _close(matrix.sum(-1), torch.ones_like(matrix[..., 0]), f"{where}: a restored constant is not that constant")
    _close((weight.unsqueeze(1) @ matrix).squeeze(1), pulled, f"{where}: pull(w) is not w @ restore(identity)")


def _check_windows(token_map: TokenMap, site: Site, reduced: Tensor, where: str) -> None:
    """A map without its protected rows, and one with rows added, act as the whole map does on those rows."""
    x, head, tail, kept = site.hidden, site.head, site.tail, reduced.shape[1]
    inner = token_map.window(head, tail, site.tokens).reduce(x[:, head : site.tokens - tail])
    _close(inner, reduced[:, head : kept - tail], f"{where}: window({head}, {tail}) is not the map without those rows")
    lead, last = x[:, :2] + 1, x[:, :1] - 1
    outer = token_map.window(-2, -1, site.tokens).reduce(torch.cat([lead, x, last], 1))
    _close(outer, torch.cat([lead, reduced, last], 1), f"{where}: window(-2, -1) is not the map with rows added")


def _check_alone(method: Reduction, site: Site, token_map: TokenMap, where: str) -> None:
    """A sample's tokens do not depend on the batch that it is in."""
    row = _row(site, site.batch)
    if site.tower is not None:
        row["tower"] = replace(site.tower, **_row(site.tower, site.batch))
    row["spans"] = {name: span[1:2] for name, span in site.spans.items()}
    alone = method.plan(replace(site, **row)).reduce(site.hidden[1:2])
    _close(alone, token_map.reduce(site.hidden)[1:2], f"{where}: a sample's tokens depend on the other samples")


def _row(owner: Any, batch: int) -> dict[str, Any]:
    """The second sample of each tensor field."""
    values = {field.name: getattr(owner, field.name) for field in fields(owner)}
    return {name: x[1:2] for name, x in values.items() if isinstance(x, Tensor) and x.shape[0] == batch}


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, like.shape[-1])


def _close(a: Tensor, b: Tensor, message: str) -> None:
    gap = (a - b).abs().max().item() if a.shape == b.shape else None
    assert gap is not None, f"{message}: shapes {list(a.shape)} and {list(b.shape)}"
    assert gap <= EXACT, f"{message}: they differ by {gap:.1e}"


def _tensors(site: Site) -> list[Tensor]:
    return [value for field in fields(site) if isinstance(value := getattr(site, field.name), Tensor)]


def _describe(site: Site) -> str:
    parts: list[Any] = [f"layer {site.layer} of {site.depth}", f"{site.batch} x {site.tokens} tokens"]
    parts += [f"{site.head} + {site.tail} protected", str(site.hidden.dtype).removeprefix("torch.")]
    parts += ["padded"] if site.valid is not None else []
    parts += ["sized"] if site.size is not None else []
    return ", ".join(parts)
