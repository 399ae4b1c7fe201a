"""The mosaics, their questions and the checkpoint: what the vision-language table stands on."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tokred
from tests.one_capture import Ways
from tokred.demo.data import split
from tokred.demo.mosaic import data, table, train
from tokred.demo.mosaic.data import CELLS, IMAGE, KINDS, PATCHES, QUESTIONS, WORDS, answers, bank, samples
from tokred.demo.mosaic.model import CHECKPOINT, build, example, load
from tokred.demo.mosaic.table import BATCH, EXACT, RECIPES, Row, cells, recipes, score, time_against_dense, write_json
from tokred.demo.mosaic.train import accuracy
from tokred.registry.recipe import parse_recipe


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def held_out():
    return samples(100, seed=5)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch.compiler.reset()


def overall(model, data):
    scores = accuracy(model, data)
    return sum(scores.values()) / len(scores)


def mosaic(text):
    """Cells [1 25] of a picture: a dot is an empty cell."""
    return torch.tensor([[-1 if sign == "." else int(sign) for sign in "".join(text.split())]])


def asked(cells, text):
    """The right answer to a question in words."""
    (number,) = [number for number, question in enumerate(QUESTIONS) if question.text == text]
    return WORDS[answers(cells)[0, number]]


# --- the data -----------------------------------------------------------------------------------------------------


def test_questions_are_answered_from_the_picture():
    picture = mosaic("7.... ..4.. ...7. 0...8 ....7")
    assert asked(picture, "which digit is in row two column three ?") == "four"
    assert asked(picture, "which digit is in row four column five ?") == "eight"
    assert asked(picture, "which digit is in row one column two ?") == "<pad>"  # empty: never asked
    assert asked(picture, "how many sevens are there ?") == "three"
    assert asked(picture, "how many ones are there ?") == "zero"
    assert asked(picture, "is there a four ?") == "yes"
    assert asked(picture, "is there an eight ?") == "yes"
    assert asked(picture, "is there a nine ?") == "no"


def test_a_digit_is_drawn_in_its_cell_and_nowhere_else():
    picture = mosaic("..... ..4.. ..... ..... ....7")
    drawn = data.draw(picture, torch.stack([torch.full((8, 8), 0.25), torch.full((8, 8), 0.5)]))[0, 0]
    wanted = -torch.ones(40, 40)
    wanted[8:16, 16:24], wanted[32:, 32:] = 0.25, 0.5
    assert torch.equal(drawn, wanted)


def test_mosaics_to_score_hold_held_out_digits_alone():
    rows = [set(split()[part].tolist()) for part in (0, 1)]
    assert not rows[0] & rows[1]
    pictures = [{tuple(image.flatten().tolist()) for image in bank(held_out).images} for held_out in (False, True)]
    assert not pictures[0] & pictures[1]
    tiles = samples(40).pixel_values.unfold(2, 8, 8).unfold(3, 8, 8).reshape(-1, 64)  # [S*25 64]
    drawn = {tuple(tile.tolist()) for tile in tiles if tile.max() > -1}
    assert drawn <= pictures[1]
    assert len(drawn) > 200


def test_the_digits_of_a_bank_have_the_labels_that_it_says():
    from sklearn.datasets import load_digits

    target = torch.from_numpy(load_digits().target)
    for held_out in (False, True):
        labels = target[split()[int(held_out)]]
        for digit, rows in enumerate(bank(held_out).rows):
            assert (labels[rows] == digit).all()
        assert sum(len(rows) for rows in bank(held_out).rows) == len(labels)


def test_no_answer_is_much_more_likely_than_the_others():
    many = samples(600)
    for number, most in zip(range(3), (0.2, 0.35, 0.6), strict=True):
        words = many.answer[many.kind == number].bincount()
        assert words.max() <= most * words.sum(), f"{KINDS[number]}: guessing one word is right too often"


def test_prompts_are_padded_on_the_left_and_hold_one_image():
    few = samples(3)
    assert ((few.input_ids == IMAGE).sum(1) == PATCHES).all()
    assert (few.attention_mask.diff(dim=1) >= 0).all()
    assert sorted(set(few.attention_mask.sum(1).tolist())) == [106, 107, 110]
    assert {WORDS[word] for word in few.input_ids[:, -1].tolist()} == {"?"}


# --- the model ----------------------------------------------------------------------------------------------------


def test_the_checkpoint_is_small():
    assert CHECKPOINT.stat().st_size < 10_000_000


@pytest.mark.slow
def test_the_model_answers_questions_about_held_out_digits(model, held_out):
    scores = accuracy(model, held_out)
    assert sum(scores.values()) / 3 > 0.95, scores
    assert min(scores.values()) > 0.9, scores


@pytest.mark.slow
def test_the_accuracy_comes_from_the_weights_and_from_the_image(model):
    few = samples(40, seed=5)
    assert overall(build().eval(), few) < 0.1
    blank = replace(few, pixel_values=torch.full_like(few.pixel_values, -1.0))
    assert overall(model, blank) < 0.5
    broken = load()
    torch.nn.init.zeros_(broken.model.multi_modal_projector.linear_2.weight)
    assert overall(broken, few) < 0.5


def test_an_answer_does_not_depend_on_padding_or_on_the_batch(model):
    few = samples(4)
    inputs = few.inputs()
    with torch.no_grad():
        together = model(**inputs).logits[:, -1]
        for sample in range(len(few)):
            real = inputs["attention_mask"][sample].bool()
            alone = {
                "input_ids": inputs["input_ids"][sample, real][None],
                "pixel_values": few.pixel_values[sample : sample + 1],
            }
            torch.testing.assert_close(model(**alone).logits[0, -1], together[sample], rtol=1e-3, atol=1e-3)


def test_the_model_says_one_word_and_ends(model):
    few = samples(4)
    said = model.generate(**few.inputs(), do_sample=False, max_new_tokens=4)[:, few.input_ids.shape[1] :]
    assert (said[:, 1:] == data.EOS).float().mean() > 0.6 or said.shape[1] == 2
    assert ((said[:, 0] == few.answer).float().mean()) > 0.7


def test_the_example_is_of_the_size_asked_for():
    _, args, inputs = example(batch=5)
    assert args == ()
    assert {len(value) for value in inputs.values()} == {5}


@pytest.mark.slow
def test_the_example_is_explained_as_one_graph():
    model, _, inputs = example(batch=2)
    (graph,) = tokred.explain(model, recipe="fastv(layer=2, keep=0.25)", **inputs).graphs
    (cut,) = [block for block in graph.blocks if block.method and block.refusal is None]
    assert (cut.module, cut.tokens) == ("model.language_model.layers.2.self_attn", (110, 35))


# --- training -----------------------------------------------------------------------------------------------------


def test_packed_questions_get_the_logits_that_they_get_alone():
    """Training packs several questions behind one mosaic; each must see what it sees in a prompt of its own."""
    torch.manual_seed(0)
    model = build().eval()
    packed = train.Packed((1, 1, 1))
    images = samples(1).pixel_values[:1]
    numbers = torch.tensor([[3, 25 + 7, 35 + 8]])
    right = torch.full_like(numbers, WORDS.index("yes"))
    embed = model.get_input_embeddings()
    with torch.no_grad():
        start = embed(torch.tensor([[data.BOS]]))
        stream = torch.cat([start, train.see(model, images)[0], embed(packed.ids(numbers, right))], dim=1)
        hidden = model.model.language_model(
            inputs_embeds=stream, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
        ).last_hidden_state[:, packed.read[:3]]
        ids, mask = data.prompts(numbers[0])
        alone = model(input_ids=ids, attention_mask=mask, pixel_values=images.expand(3, -1, -1, -1)).logits[:, -1]
    torch.testing.assert_close(model.lm_head(hidden)[0], alone, rtol=1e-4, atol=1e-4)


def test_each_patch_is_of_the_cell_it_lies_in():
    numbered = torch.arange(CELLS * CELLS).float()
    drawn = data.draw(torch.zeros(1, 25, dtype=torch.long), numbered[:, None, None].expand(-1, 8, 8))
    patches = torch.nn.functional.unfold(drawn, kernel_size=4, stride=4)[0].mean(0)
    assert torch.equal(patches.long(), train.of_patches())


def test_updates_are_made_orthogonal():
    values = torch.linalg.svdvals(train.orthogonal(torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.5
    assert values.max() < 1.3


# --- the table ----------------------------------------------------------------------------------------------------


def test_every_recipe_can_be_read_and_a_method_that_is_not_registered_is_left_out(monkeypatch):
    for row in recipes()[1:]:
        assert parse_recipe(row.recipe).methods
    monkeypatch.setattr(tokred, "methods", lambda: {"fastv": None})
    assert [row.method for row in recipes((75,))] == ["dense", "fastv"]
    assert [row.recipe for row in recipes((90, 50))] == [EXACT, RECIPES["fastv"][0], RECIPES["fastv"][2]]


def test_a_score_counts_last_words_by_kind_over_all_batches(monkeypatch):
    """A model that is right about the first batch, and behind it about "is there" alone."""
    many = samples(40)
    assert len(many) == 2 * BATCH
    calls = []

    def function(input_ids, logits_to_keep, **inputs):
        part = slice(len(calls) * BATCH, (len(calls) + 1) * BATCH)
        calls.append(part)
        assert logits_to_keep == 1
        assert torch.equal(input_ids, many.input_ids[part])
        right = torch.ones(BATCH, dtype=torch.bool) if len(calls) == 1 else many.kind[part] == 2
        logits = torch.zeros(BATCH, 2, 200)
        logits[:, 0, 7] = 9.0  # nobody asked what comes first
        logits[torch.arange(BATCH), 1, torch.where(right, many.answer[part], 199)] = 1.0
        text = many.input_ids.shape[1] - PATCHES
        layers = [SimpleNamespace(keys=torch.zeros(BATCH, 1, text + kept, 2)) for kept in (100, 7)]
        return SimpleNamespace(logits=logits, past_key_values=SimpleNamespace(layers=layers))

    seen = [[SimpleNamespace(flops=(1, 1))]]
    seen.append(seen[0] + [SimpleNamespace(flops=(60, 20)), SimpleNamespace(flops=(40, 5))])
    monkeypatch.setattr(table, "_compiled", lambda model, row, lower: function)
    monkeypatch.setattr(tokred, "reports", lambda: SimpleNamespace(graphs=seen[bool(calls)]))
    row = score(None, many, Row("fastv", 75, "fastv()"))
    first = [float((many.kind[:BATCH] == kind).sum() / (many.kind == kind).sum()) for kind in range(3)]
    assert row.accuracy == pytest.approx(dict(zip(KINDS, [first[0], first[1], 1.0], strict=True)))
    assert 0 < first[0] < 1
    assert row.total == pytest.approx((first[0] + first[1] + 1) / 3)
    assert (row.visual, row.flops) == ([100, 7], 0.25)
    shown = [f"{row.total:.1%}", *(f"{row.accuracy[kind]:.1%}" for kind in KINDS), "53.5", "7", "0.25", "", ""]
    assert list(cells(row)) == shown


def test_speeds_are_the_dense_model_s_time_over_the_reduced_one_s(model, monkeypatch):
    seconds = iter([{"dense": 3.0, "reduced": 2.0}, {"dense": 8.0, "reduced": 10.0}])
    monkeypatch.setattr(table, "interleaved", lambda functions, rounds: next(seconds))
    row = time_against_dense(model, samples(20), Row("dense", 0, EXACT))
    assert (row.prefill, row.end_to_end) == (1.5, 0.8)


@pytest.mark.slow
def test_recipes_of_a_level_have_about_the_same_tokens(model):
    few = samples(2)
    deep = ("random", "norm", "pool", "fastv", "pyramiddrop", "adaptinfer", "corematching", "hidrop")
    # the others are in front of layer 0: fewer
    ways = Ways(row.recipe for row in recipes((75,)) if row.method in deep and "layers.0" not in row.recipe)
    fast = ways.generating(model)
    for way in ways:
        with torch.no_grad():
            caches = fast(**few.inputs(), logits_to_keep=1).past_key_values.layers
        visual = [layer.keys.shape[-2] - (few.input_ids.shape[1] - PATCHES) for layer in caches]
        assert abs(sum(visual) / len(visual) - 43.75) < 1, way
    assert len(ways.options) >= len(deep)


@pytest.mark.slow
def test_rows_are_scored_and_written(model, tmp_path):
    few = samples(20)
    dense, cut = (score(model, few, row) for row in recipes((75,)) if row.recipe in (EXACT, RECIPES["fastv"][1]))
    assert dense.accuracy == accuracy(model, few)
    assert dense.visual == [100] * 8
    assert cut.visual == [100] * 2 + [25] * 6
    assert 0.4 < cut.flops < 0.9
    assert len(list(cells(cut))) == 9
    written = json.loads(write_json([dense, cut], tmp_path / "mosaic.json", {"torch": "x"}).read_text())
    assert [row["recipe"] for row in written["rows"]] == [EXACT, "fastv(layer=2, keep=0.25)"]
