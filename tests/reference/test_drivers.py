"""The oracles' own tests: nothing removed gives the unmodified model; counts, places and sums are as claimed."""

from __future__ import annotations

import pytest
import torch

from .cases import BY_NAME, CASES, DEIT_SMALL, Case, outputs
from .clip import probe, siglip_vision
from .driver import Cut, Method, Site
from .evit import EViT
from .expedit import Expedit
from .pitome import PiToMe
from .tofu import ToFu, mlerp
from .tome import ToMe, match, schedule

ALL_METHODS: dict[str, Method] = {
    "tome": ToMe(5),
    "tofu": ToFu(5),
    "pitome": PiToMe(0.85),
    "evit": EViT(0.7, [1, 2]),
    "expedit": Expedit(1, (4, 4)),
}

# EViT needs a class token, Expedit a grid.
PAIRS = [
    (case, name)
    for case in CASES
    for name in ALL_METHODS
    if (name != "evit" or case.head) and (name != "expedit" or case.grid)
]
ENDS = [(0, 0), (1, 0), (2, 0), (5, 0), (1, 1), (0, 3)]


@pytest.mark.parametrize("case", [*CASES, DEIT_SMALL], ids=lambda case: case.name)
def test_driver_with_nothing_removed_is_the_model(case: Case) -> None:
    model, x = case.build(), case.inputs(batch=2)
    with torch.no_grad():
        ours = case.oracle(model, x, None)
        theirs = outputs(model, x, list(ours))
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case, name", PAIRS, ids=lambda value: value if isinstance(value, str) else value.name)
def test_reduction_changes_the_numbers_and_not_the_shapes(case: Case, name: str) -> None:
    model, x = case.build(), case.inputs(batch=2)
    with torch.no_grad():
        full = case.oracle(model, x, None)
        less = case.oracle(model, x, ALL_METHODS[name])
    for key in full:
        assert less[key].shape == full[key].shape
        assert less[key].isfinite().all()
        assert (less[key] - full[key]).abs().max() > 1e-6


def site(n: int = 20, head: int = 1, tail: int = 0, layer: int = 0, grid: tuple[int, int] | None = None) -> Site:
    g = torch.Generator().manual_seed(n)
    x, k = torch.randn(2, n, 6, generator=g).double(), torch.randn(2, 3, n, 4, generator=g).double()
    probs = torch.randn(2, 3, n, n, generator=g).double().softmax(-1)
    return Site(layer, 4, x, k, probs, x.new_ones(2, n), head, tail, grid)


@pytest.mark.parametrize(
    "name, head, tail", [(name, head, tail) for name in ALL_METHODS for head, tail in ENDS if name != "evit" or head]
)
def test_protected_tokens_stay_in_place(name: str, head: int, tail: int) -> None:
    patches = 64 if name == "expedit" else 20
    here = site(head + patches + tail, head, tail, layer=1, grid=(8, 8))
    cut = ALL_METHODS[name].cut(here)
    assert isinstance(cut, Cut)
    n, n_new = here.x.shape[1], cut.x.shape[1]
    assert n_new < n
    assert torch.equal(cut.x[:, :head], here.x[:, :head])
    assert torch.equal(cut.x[:, n_new - tail :], here.x[:, n - tail :])
    assert torch.equal(cut.sizes[:, :head], here.sizes[:, :head])
    torch.testing.assert_close(cut.restore.sum(-1), torch.ones(2, n, dtype=torch.float64))


@pytest.mark.parametrize(
    "method, n_new", [(ToMe(3), 17), (ToMe(99), 11), (ToFu(3), 17), (PiToMe(0.8), 17), (EViT(0.5, [0]), 12)]
)
def test_counts(method: Method, n_new: int) -> None:
    cut = method.cut(site(20))
    assert cut is not None and cut.x.shape[1] == n_new


@pytest.mark.parametrize("method", [ToMe(4), PiToMe(0.75)])
def test_merging_keeps_the_mass(method: Method) -> None:
    here = site(20)
    cut = method.cut(here)
    assert cut is not None
    assert cut.sizes.sum(1).tolist() == [20.0, 20.0]
    torch.testing.assert_close((cut.x * cut.sizes[..., None]).sum(1), here.x.sum(1))


def test_tome_by_hand() -> None:
    """Seven tokens, the class token first; the two nearest pairs are (4, 5) and (2, 3)."""
    metric = torch.zeros(7, 3, dtype=torch.float64)
    metric[[0, 1, 6]] = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.5, 0.0], [0.0, -1.0, 0.3]], dtype=torch.float64)
    metric[[2, 3]] = torch.tensor([[1.0, 0.0, 0.1], [1.0, 0.0, 0.0]], dtype=torch.float64)
    metric[[4, 5]] = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.01, 1.0]], dtype=torch.float64)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    cosine = metric @ metric.T
    assert match(cosine, 1, 1, 0) == [[0], [2], [6], [1], [3], [5, 4]]
    assert match(cosine, 2, 1, 0) == [[0], [6], [1], [3, 2], [5, 4]]
    assert match(cosine, 1, 1, 2) == [[0], [4], [1], [3, 2], [5], [6]]  # 5 and 6 protected: (4, 5) may not merge


@pytest.mark.parametrize(
    "r, expected",
    [
        (5, [5, 5, 5, 5]),
        ([4, 3], [4, 3, 0, 0]),
        ((6, 0.0), [6, 6, 6, 6]),
        ((6, -1.0), [12, 8, 4, 0]),
        ((6, 1.0), [0, 4, 8, 12]),
        ((6, 0.5), [3, 5, 7, 9]),
    ],
)
def test_schedule(r: int | list[int] | tuple[int, float], expected: list[int]) -> None:
    assert [schedule(r, layer, 4) for layer in range(4)] == expected


def test_mlerp_is_as_long_as_the_longest() -> None:
    rows = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    merged = mlerp(rows)
    assert merged.norm().item() == pytest.approx(5.0)
    assert (merged[0] / merged[1]).item() == pytest.approx(4.0 / 4.0)


def test_tofu_prunes_first_and_merges_later() -> None:
    early, late = ToFu(3).cut(site(20, layer=1)), ToFu(3).cut(site(20, layer=2))
    assert early is not None and late is not None
    rows = site(20).x[0]
    assert all(any(torch.equal(row, old) for old in rows) for row in early.x[0])
    assert not all(any(torch.equal(row, old) for old in rows) for row in late.x[0])
    assert torch.equal(early.restore, late.restore)


def test_evit_fuses_what_it_drops() -> None:
    here = site(9)
    cut = EViT(0.5, [0]).cut(here)
    assert cut is not None
    attention = here.probs[0, :, 0].mean(0)
    dropped = cut.restore[0, :, -1].nonzero().flatten()
    assert attention[dropped].max() < attention[[i for i in range(1, 9) if i not in dropped.tolist()]].min()
    torch.testing.assert_close(cut.x[0, -1], (attention[dropped, None] * here.x[0, dropped]).sum(0))
    kept = cut.restore[0, 1:, 1:-1].argmax(0) + 1
    assert attention[kept].tolist() == sorted(attention[kept].tolist(), reverse=True)


def test_expedit_rows_are_convex_and_local() -> None:
    here = site(65, head=1, grid=(8, 8))
    cut = Expedit(0, (8, 8), tau=1e-9).cut(here)
    assert cut is not None and cut.x.shape[1] == 65
    mean = cut.x[0, 1 + 3 * 8 + 3]  # tau -> 0: every centre is nearly a mean of its window; never exactly the token
    assert not torch.allclose(mean, here.x[0, 1 + 3 * 8 + 3])
    sharp = Expedit(0, (8, 8), tau=1e6).cut(here)
    assert sharp is not None
    torch.testing.assert_close(sharp.x, here.x)  # as many centres as tokens, sharply assigned: nothing moves
    torch.testing.assert_close(sharp.restore @ sharp.x, here.x)


def test_prop_attn_is_attention_over_copies() -> None:
    """log(size) over merged keys is the same as attending to every copy: SigLIP's probe cannot tell them apart."""
    case = BY_NAME["siglip_vision"]
    model, x = case.build(), case.inputs(2)
    with torch.no_grad():
        out = siglip_vision(model, x, ToMe(6))
        again = probe(model.head, out["last_hidden_state"], 0.0)
    torch.testing.assert_close(out["pooler_output"], again, rtol=1e-12, atol=1e-12)
