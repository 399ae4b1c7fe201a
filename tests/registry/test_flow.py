"""Site.flow is the attention that Site.attend shows, summed over its rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokred import Place, Site
from tokred.testing.sites import make_site

PLACE = Place(layer=1, depth=4, tokens=29, span=12, whole=16)


def rows_of(site: Site) -> Tensor:
    return site.attend(site.arange(0, site.tokens))  # [B H N N]


@pytest.mark.parametrize("kind", ["plain", "padded", "causal", "additive", "sized", "grouped"])
def test_the_columns_of_the_attention_are_summed(kind: str) -> None:
    site = make_site(PLACE, dtype=torch.float64, padded=kind == "padded", sized=kind == "sized")
    changes: dict[str, Any] = {
        "causal": {"causal": True},
        "additive": {"mask": torch.randn(1, 1, 29, 29, dtype=torch.float64)},
        "sized": {"prop_attn": True},
        "grouped": {"key": site.key[:, :2]},  # type: ignore[index]
    }
    site = replace(site, **changes.get(kind, {}))
    weight = torch.rand(3, 4, 29, dtype=torch.float64)
    attention = rows_of(site)
    torch.testing.assert_close(site.flow(weight), (weight.unsqueeze(2) @ attention).squeeze(2))
    torch.testing.assert_close(site.flow(weight[:, 0]), (weight[:, :1].unsqueeze(2) @ attention).squeeze(2))
    sharper = (attention.log() / 0.1).softmax(-1)
    twice = (weight.unsqueeze(2) @ sharper @ sharper).squeeze(2)
    torch.testing.assert_close(site.flow(weight, temperature=0.1, steps=2), twice)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_model_s_own_weights_are_used_where_it_has_them(temperature: float) -> None:
    site = replace(make_site(PLACE, dtype=torch.float64), causal=True)
    eager = replace(site, weights=rows_of(site), query=None, key=None, mask=None)
    weight = torch.rand(3, 29, dtype=torch.float64)
    found, wanted = (each.flow(weight, temperature=temperature, steps=3) for each in (eager, site))
    torch.testing.assert_close(found, wanted)


def test_no_matrix_is_made() -> None:
    site = make_site(Place(layer=0, depth=2, tokens=6000), batch=1)
    assert site.query is not None and site.query.shape[2] == 6000
    from tokred.backends.kernels import column_sums as module

    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(largest, result.numel() if isinstance(result, Tensor) else 0)
            return result

    with Watch():
        module.column_sums._init_fn(site.query, site.key, torch.ones(1, 4, 6000), None, False, 1.0, 1.0, 1)
    assert 0 < largest <= module.ELEMENTS < 4 * 6000**2
