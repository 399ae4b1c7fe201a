"""AIM against plain Python: rounds of merging, PageRank over the whole matrix, and both in whole decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.decoders import oracle
from tests.decoders.models import LENGTH, SPAN, build, prompts
from tokred import Place
from tokred.registry.recipe import parse_recipe
from tokred.testing.sites import make_site

pytestmark = pytest.mark.usefixtures("fresh")


def halved(tokens: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """One round for one sample: (row, features), every other token joins the most similar of the rest; plain means."""
    groups = {number: [tokens[number][1]] for number in range(1, len(tokens), 2)}
    likeness = {
        number: [float(torch.cosine_similarity(x, tokens[other][1], dim=0)) for other in groups]
        for number, (_, x) in enumerate(tokens)
        if number % 2 == 0
    }
    stays = min(likeness, key=lambda number: max(likeness[number])) if len(tokens) % 2 else None
    for number, found in likeness.items():
        if number == stays:
            groups[number] = [tokens[number][1]]
        else:
            groups[list(range(1, len(tokens), 2))[found.index(max(found))]].append(tokens[number][1])
    return [(tokens[number][0], torch.stack(groups[number]).mean(0)) for number in sorted(groups)]


def merged(x: Tensor, visual: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """[B K C] the tokens with the image's merged, in order, and [B K] their rows."""
    features, rows = [], []
    for sample, inside in zip(x, visual, strict=True):
        image = [(row, sample[row]) for row in inside.nonzero().squeeze(-1).tolist()]
        for _ in range(rounds):
            image = halved(image)
        kept = dict(image) | {row: sample[row] for row in (~inside).nonzero().squeeze(-1).tolist()}
        rows.append(torch.tensor(sorted(kept)))
        features.append(torch.stack([kept[row] for row in sorted(kept)]))
    return torch.stack(features), torch.stack(rows)


def pagerank(attention: Tensor, left: Tensor) -> Tensor:
    """[B N] from attention [B H N N]: five steps over softmax(logits / 0.1) from a uniform start over what is left."""
    matrix = (attention.log() / 0.1).softmax(-1).nan_to_num(0.0)
    flow = (left / left.sum(-1, keepdim=True))[:, None, None].to(matrix.dtype)
    for _ in range(5):
        flow = flow @ matrix
    return flow.squeeze(2).square().mean(1).sqrt()


@pytest.mark.parametrize(("tokens", "rounds"), [(12, 1), (12, 2), (13, 2), (11, 3)])
def test_rounds_of_merging_are_the_loops_of_the_reference(tokens: int, rounds: int) -> None:
    method = parse_recipe(f"aim(keep=[{0.5**rounds}])").methods[0]
    site = make_site(Place(layer=0, depth=12, tokens=29, span=tokens, whole=tokens), dtype=torch.float64)
    wanted, rows = merged(site.hidden, site.inside, rounds)  # type: ignore[arg-type]
    token_map = method.plan(site)
    torch.testing.assert_close(token_map.reduce(site.hidden), wanted)
    places = torch.arange(29.0).expand(3, -1).unsqueeze(-1)
    assert token_map.pick(places).squeeze(-1).tolist() == rows.tolist()
    assert 29 - method.removed(site) == rows.shape[1]


def test_importance_is_pagerank_over_the_sharpened_attention() -> None:
    method: Any = parse_recipe("aim()").methods[0]
    site = make_site(Place(layer=8, depth=12, tokens=29, span=12, whole=48), dtype=torch.float64, padded=True)
    assert site.valid is not None
    attention = site.attend(site.arange(0, 29)) * site.valid[:, None, :, None]
    matrix = (attention.log() / 0.1).softmax(-1).nan_to_num(0.0)
    dense = (
        torch.full((3, 4, 1, 29), 1.0, dtype=torch.float64)
        * (site.valid / site.valid.sum(-1, keepdim=True))[:, None, None]
    )
    for _ in range(5):
        dense = dense @ matrix
    torch.testing.assert_close(method.score(site), dense.squeeze(2).square().mean(1).sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_a_decoder_on_merged_and_dropped_tokens_is_the_model_run_by_hand(name: str) -> None:
    inputs, plain = prompts(), build(name)
    plain.set_attn_implementation("oracle")
    places = torch.arange(LENGTH).expand(3, -1)
    image = (places >= SPAN[0]) & (places < SPAN[1])
    entering, rows = merged(oracle.embeddings(plain, inputs), image, 1)
    short = {key: inputs[key].gather(1, rows) for key in ("attention_mask", "position_ids")} | {
        "inputs_embeds": entering
    }
    left, dropped = image.gather(1, rows), {}
    real = short["attention_mask"].bool()
    for layer, share in ((2, 0.5), (3, 0.34), (4, 0.0)):
        attention = oracle.attention_of(plain, short, layer - 1, dropped)
        gone = torch.zeros_like(real)
        for each in dropped.values():
            gone |= each
        dropped[layer] = oracle._all_but_top(pagerank(attention, real & ~gone), left, round(share * 6))
        left = left & ~dropped[layer]
    with torch.no_grad(), oracle.masked(dropped):
        wanted = plain(**short, use_cache=False).logits
    recipe = "aim(keep=[0.5, 0.5, 0.34, 0], layers=[0, 2, 3, 4])"
    with torch.no_grad():
        output = tokred.compile(build(name), recipe, lower="eager", spans={"visual": SPAN})(**inputs)
    text = (rows < SPAN[0]) | (rows >= SPAN[1])
    for sample in range(3):
        mine = [(i, row) for i, row in enumerate(rows[sample].tolist()) if real[sample, i] and text[sample, i]]
        gap = (output.logits[sample, [row for _, row in mine]] - wanted[sample, [i for i, _ in mine]]).abs().max()
        assert gap < 1e-9 * wanted.abs().max(), f"off by {gap}"
    kept = [layer.rows.shape[1] for layer in output.past_key_values.layers]
    assert kept == [LENGTH - 6, LENGTH - 6, LENGTH - 9, LENGTH - 10, LENGTH - 12]
