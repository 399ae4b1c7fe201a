"""SparseVLM's raters and scores against loops, where prompts are padded at the end or have next to no text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokred import Place, Site
from tokred.registry.recipe import parse_recipe
from tokred.testing.sites import make_site

METHOD: Any = parse_recipe("sparsevlm(keep=0.5, layers=3)").methods[0]
PLACE = Place(layer=3, depth=12, tokens=31, span=12, whole=12)


def raters(site: Site) -> list[list[int]]:
    """The text behind the image, padding apart, whose share of the likeness is above the mean; all, if none is."""
    found = []
    for sample, x in enumerate(site.hidden.double()):
        assert site.inside is not None
        image = site.inside[sample].nonzero().squeeze(-1).tolist()
        text = [row for row in range(max(image) + 1, len(x)) if site.valid is None or site.valid[sample, row]]
        share = dict.fromkeys(text, 0.0)
        for patch in image:
            weights = torch.stack([x[patch] @ x[word] for word in text]).softmax(0) if text else []
            for word, weight in zip(text, weights, strict=True):
                share[word] += float(weight) / len(image)
        above = [word for word in text if share[word] > sum(share.values()) / len(text)]
        found.append(above or text)
    return found


def rows(prepared: Tensor) -> list[list[int]]:
    assert set(prepared.unique().tolist()) <= {0.0, 1.0}
    return [row.nonzero().squeeze(-1).tolist() for row in prepared]


def early(site: Site, behind: int) -> Site:
    """The same site with the image at the front and `behind` tokens of text after it, but for what is padding."""
    inside = torch.zeros_like(site.inside)  # type: ignore[arg-type]
    inside[:, site.tokens - behind - 12 : site.tokens - behind] = True
    valid = torch.ones_like(inside) if site.valid is None else site.valid
    behind_it = torch.arange(site.tokens) >= site.tokens - behind
    return replace(site, inside=inside, spans={"instruction": behind_it & valid})


@pytest.mark.parametrize("padded", [False, True])
def test_raters_are_words_that_resemble_the_image(padded: bool) -> None:
    site = early(make_site(PLACE, dtype=torch.float64, padded=padded), 17)
    wanted = raters(site)
    assert rows(METHOD.prepare(site)) == wanted
    if padded:
        assert site.valid is not None
        texts = [int(valid[14:].sum()) for valid in site.valid]
        assert texts == [17, 10, 17]
        assert all(0 < len(some) < text for some, text in zip(wanted, texts, strict=True))


def test_only_text_shares_the_likeness_of_a_patch() -> None:
    """A patch that no word resembles gives its whole share to the words all the same."""
    for seed in range(12):
        site = early(make_site(PLACE, dtype=torch.float64, seed=seed), 6)
        assert rows(METHOD.prepare(site)) == raters(site), f"seed {seed}"


def test_one_word_rates_although_it_is_not_above_the_mean() -> None:
    site = early(make_site(PLACE, dtype=torch.float64), 1)
    assert rows(METHOD.prepare(site)) == [[30]] * 3


def test_without_text_nothing_rates_and_nothing_is_nan() -> None:
    site = early(make_site(PLACE, dtype=torch.float64), 0)
    prepared = METHOD.prepare(site)
    assert rows(prepared) == [[], [], []]
    assert METHOD.score(replace(site, prepared=prepared)).eq(0).all()


def test_the_score_is_the_raters_mean_attention_over_heads() -> None:
    site = early(make_site(PLACE, dtype=torch.float64, padded=True), 17)
    site = replace(site, prepared=METHOD.prepare(site))
    attention = site.attend(site.arange(0, 31))
    score = METHOD.score(site)
    for sample, chosen in enumerate(raters(site)):
        wanted = torch.stack([attention[sample, head, word] for head in range(4) for word in chosen]).mean(0)
        torch.testing.assert_close(score[sample], wanted)
