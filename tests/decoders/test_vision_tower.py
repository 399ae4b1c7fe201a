"""VisionZip, and the vision encoder that a site shows, against transformers' own modules, called by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import tokred
from tests.compiler.graphs import captured
from tests.decoders import diverse
from tests.decoders.models import IMAGE, PATCHES, build, prompts
from tokred.compiler.axes import Axes
from tokred.compiler.blocks import find_blocks
from tokred.compiler.towers import Tower, find_tower

KEEP, CONTEXTUAL = 8, 2


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    yield
    torch.compiler.reset()


def zipped(model: Any, pixels: Tensor, head: int) -> tuple[list[list[int]], Tensor]:
    """The kept patches of each sample, and their features [B K C], as the paper says: one sample after the other."""
    hidden, attention, keys = diverse.encoder(model, pixels)
    kept, features = [], []
    for sample in range(len(pixels)):
        patches, key = hidden[sample, head:], keys[sample].mean(1)[head:]
        rows = attention[sample][:, :1] if head else attention[sample]
        score = rows.mean((0, 1))[head:]
        dominant = sorted(score.argsort(descending=True)[: KEEP - CONTEXTUAL].tolist())
        rest = [patch for patch in range(PATCHES) if patch not in dominant]
        targets = rest[:: len(rest) // CONTEXTUAL][:CONTEXTUAL]
        groups: dict[int, list[int]] = {target: [] for target in targets}
        for patch in rest:
            if patch not in targets:
                like = cosine_similarity(key[patch], key[targets])
                groups[targets[int(like.argmax())]].append(patch)
        values = {patch: patches[patch] for patch in dominant}
        for target, members in groups.items():
            values[target] = patches[target] + (patches[members].mean(0) if members else 0)
        kept.append(sorted(values))
        features.append(torch.stack([values[patch] for patch in sorted(values)]))
    with torch.no_grad():
        return kept, model.model.multi_modal_projector(torch.stack(features))


@pytest.mark.slow
@pytest.mark.parametrize("name, head", [("llava", 1), ("llava_qwen3", 0), ("llava_mistral", 1)])
def test_visionzip_is_the_language_model_on_the_kept_and_merged_features(name: str, head: int) -> None:
    inputs = prompts(3, model=name)
    plain = build(name, layers=3)
    kept, features = zipped(plain, inputs["pixel_values"], head)
    visual = inputs["input_ids"] == IMAGE
    left = ~visual
    embeddings = plain.get_input_embeddings()(inputs["input_ids"]).detach()
    for sample, patches in enumerate(kept):
        rows = visual[sample].nonzero().squeeze(-1)[patches]
        left[sample, rows] = True
        embeddings[sample, rows] = features[sample]
    size = (3, int(left[0].sum()))
    with torch.no_grad():
        wanted = plain.model.language_model(
            inputs_embeds=embeddings[left].view(*size, -1),
            attention_mask=inputs["attention_mask"][left].view(size),
            position_ids=inputs["position_ids"][left].view(size),
        ).last_hidden_state
        wanted = plain.lm_head(wanted)

        model = tokred.compile(
            build(name, layers=3), f"visionzip(keep=0.5, contextual={CONTEXTUAL / KEEP})", lower="eager", strict=True
        )
        output = model(**inputs)
    assert [layer.rows.tolist() for layer in output.past_key_values.layers] == [
        [row.nonzero().squeeze(-1).tolist() for row in left]
    ] * 3
    real = inputs["attention_mask"][left].bool()
    got = output.logits[left]
    assert (got[real] - wanted.flatten(0, 1)[real]).abs().max() < 1e-9 * wanted.abs().max()
    assert len(tokred.reports().graphs) >= 1


@pytest.mark.slow
def test_a_vision_language_model_is_one_graph() -> None:
    tokred.reset()
    model = tokred.compile(build("llava", layers=3), "fastv(layer=2, keep=0.5)", lower="eager", strict=True)
    with torch.no_grad():
        model(**prompts(2, model="llava"))
    assert len(tokred.reports().graphs) == 1


@pytest.mark.slow
def test_a_tower_that_lost_tokens_of_its_own_is_none() -> None:
    tokred.reset()
    recipe = "norm(keep=0.5, layers='*vision_tower*0*') + visionzip(keep=0.5)"
    model = tokred.compile(build("llava", layers=3), recipe, lower="eager")
    with torch.no_grad():
        model(**prompts(2, model="llava"))
    blocks = [block for graph in tokred.reports().graphs for block in graph.blocks if block.method]
    assert [(block.method.split("(")[0], block.refusal and block.refusal.code) for block in blocks] == [
        ("norm", None),
        ("visionzip", "no-vision-tower"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["visionzip(keep=0.5)", "zoo_prune(keep=0.5)"])
def test_no_tower_is_seen_behind_shuffled_pixels(recipe: str) -> None:
    """InternVL makes one image token of four patches."""
    tokred.reset()
    model = tokred.compile(build("internvl", layers=3), recipe, lower="eager")
    with torch.no_grad():
        model(**prompts(2, model="internvl"))
    refusals = [block.refusal for graph in tokred.reports().graphs for block in graph.blocks if block.refusal]
    assert [refusal.code for refusal in refusals] == ["no-vision-tower"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "blind"), [("internvl", True), ("llava", False)])
def test_a_method_that_only_wants_a_tower_acts_without_one_and_the_report_says_so(name: str, blind: bool) -> None:
    tokred.reset()
    model = tokred.compile(build(name, layers=3), "todre(keep=0.5)", lower="eager", strict=True)
    with torch.no_grad():
        model(**prompts(2, model=name))
    notes = [block.note for graph in tokred.reports().graphs for block in graph.blocks if block.method]
    assert ["no vision encoder shows" in note for note in notes] == [blind, False]


# -- what is and what is not the features of a tower ------------------------------------------------------------------


class Seen(torch.nn.Module):
    """A class token and nine patches through one attention; `after` turns them into features."""

    def __init__(self, after: Any) -> None:
        super().__init__()
        self.qkv, self.project, self.after = torch.nn.Linear(8, 24), torch.nn.Linear(8, 6), after

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        stream = x + y.transpose(1, 2).flatten(2)
        return self.after(self, stream)  # type: ignore[no-any-return]


def tower_of(after: Any) -> Tower | None:
    (graph,) = captured(Seen(after), torch.randn(3, 10, 8))
    (features,) = graph.graph.output_node().args[0]  # type: ignore[misc]
    return find_tower(features, find_blocks(graph, Axes(graph.graph)).attentions)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "after, first",
    [
        (lambda m, x: m.project(x[:, 1:]), 1),
        (lambda m, x: m.project(x), 0),
        (lambda m, x: m.project(x[:, 1:]).reshape(-1, 6), 1),
        (lambda m, x: torch.cat(list(m.project(x[:, 1:]).unbind(0))), 1),
        (lambda m, x: torch.cat(m.project(x[:, 1:].reshape(-1, 8)).split([9, 9, 9])).relu(), 1),
    ],
)
def test_rows_in_order_show_their_tower(after: Any, first: int) -> None:
    tower = tower_of(after)
    assert tower is not None
    assert tower.first == first


@pytest.mark.parametrize(
    "after",
    [
        lambda m, x: m.project(x[:, 1:].flip(1)),
        lambda m, x: m.project(x[:, :9]),
        lambda m, x: m.project(x[:, 1::2]),
        lambda m, x: m.project(x[:, 2:].transpose(0, 1)),
        lambda m, x: torch.cat(list(m.project(x[:, 1:]).unbind(0))[::-1]),
        lambda m, x: torch.cat([m.project(x[:2, 1:]).reshape(-1, 6), m.project(x[:1, 1:]).reshape(-1, 6)]),
        lambda m, x: m.project(x[:, 2:].reshape(3, 4, 16)[..., :8]),
        lambda m, x: m.project(x[:, 1:] * x[:, :1]),
        lambda m, x: m.project(x).softmax(1),
    ],
)
def test_rows_out_of_order_or_mixed_show_none(after: Any) -> None:
    assert tower_of(after) is None


def test_features_from_another_graph_show_none() -> None:
    (graph,) = captured(torch.nn.Linear(8, 6), torch.randn(3, 10, 8))
    inputs = [node for node in graph.graph.find_nodes(op="placeholder") if node.meta["val"].dim() == 3]
    assert find_tower(inputs[0], []) is None
