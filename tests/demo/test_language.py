"""The standard library as text, associative recall, and the checkpoints: what the tables of neurons stand on."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import tokred
from tokred.demo.language import data, recall, table
from tokred.demo.language.data import END, VOCABULARY, corpus, decode, encode, is_held_out, windows
from tokred.demo.language.model import ACTIVATIONS, WINDOW, build, checkpoint, example, load
from tokred.demo.language.recall import CONTEXT, FILLER, KEYS, LENGTH, PAIRS, VALUES, pairs
from tokred.demo.language.score import baselines, bits_per_byte, perplexity
from tokred.demo.language.table import BATCH, LEVELS, Row, by_hand, cells, recipes, score
from tokred.registry.recipe import parse_recipe

# Of Python 3.11.7, which the checkpoints were trained and scored with; another Python's text is another one.
DIGEST = "026fdbc9ade85966"
RECORDED = {"silu": 42.576, "relu": 42.794}  # perplexity of 8 windows


@pytest.fixture(scope="module")
def held_out():
    return corpus(held_out=True).tokens()


@pytest.fixture(scope="module")
def models():
    return {name: load(name) for name in ACTIVATIONS} | {"recall": recall.load()}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch.compiler.reset()


def saying(choose):
    """A model that is sure of what `choose` says behind input_ids [B N]."""

    def model(input_ids, use_cache):
        return SimpleNamespace(logits=100.0 * F.one_hot(choose(input_ids), VOCABULARY))

    return model


# --- the text -----------------------------------------------------------------------------------------------------


def test_a_file_is_held_out_by_its_name_alone():
    names = ["abc.py", "asynchat.py", "argparse.py", "copyreg.py", "json/decoder.py", "distutils/__init__.py"]
    assert [name for name in names if is_held_out(name)] == ["asynchat.py", "copyreg.py", "distutils/__init__.py"]
    assert 30 < sum(is_held_out(f"module_{number}.py") for number in range(1000)) < 100  # about one of 16


def test_the_two_parts_are_disjoint_and_hold_no_tests():
    training, scored = (set(corpus(held_out=part).names) for part in (False, True))
    assert not training & scored
    assert {"argparse.py", "json/decoder.py"} <= training
    assert "copyreg.py" in scored
    for name in training | scored:
        assert not {"test", "tests", "site-packages", "encodings"} & set(name.split("/")), name


def test_a_corpus_is_what_its_folder_holds(tmp_path):
    for name in ("argparse.py", "copyreg.py", "test/copyreg.py", "_sysconfigdata_x.py", "config-3/a.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name} ü\n", "utf-8")
    parts = [corpus(part, tmp_path) for part in (False, True)]
    assert [part.names for part in parts] == [("argparse.py",), ("copyreg.py",)]
    assert parts[0].bytes == len("# argparse.py ") + 2 + 1
    assert parts[0].digest != parts[1].digest
    corpus.cache_clear()
    (tmp_path / "copyreg.py").write_text("changed\n")
    again = [corpus(part, tmp_path) for part in (False, True)]
    assert again[0].digest == parts[0].digest
    assert again[1].digest != parts[1].digest
    assert again[1].names == parts[1].names


def test_any_text_comes_back_from_its_tokens():
    for text in (
        "def f(x):\n\treturn  x\r\n",
        "übung = '日本語 🙂'\x00\n",
        "",
        "    " * 9,
        *corpus(held_out=True).texts[:5],
    ):
        assert decode(encode(text)) == text
    assert max(encode(corpus(held_out=True).texts[0])) < VOCABULARY
    assert len(encode("        return self.")) <= 4  # common words are one token: it was trained


def test_files_follow_one_another_behind_an_end():
    few = data.Corpus(("a.py", "b.py"), ("import os\n", "x = 1\n"))
    assert few.tokens().tolist() == [END, *encode("import os\n"), END, *encode("x = 1\n")]


def test_windows_are_spread_from_start_to_end():
    assert windows(torch.arange(10), 3, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    with pytest.raises(ValueError, match="a window of 3 tokens and the one behind it do not fit into 3"):
        windows(torch.arange(3), 1, 3)


# --- scores -------------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_next_token():
    tokens = torch.arange(101) % 50
    assert perplexity(saying(lambda ids: (ids + 1) % 50), tokens, 2, 20) == pytest.approx(1)
    assert perplexity(saying(lambda ids: ids), tokens, 2, 20) > 1e30

    def unsure(input_ids, use_cache):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 64))

    for batch in (1, 3, 8):
        assert perplexity(unsure, tokens, batch, 20) == pytest.approx(64)


def test_bits_per_byte_do_not_depend_on_the_tokens_size():
    assert bits_per_byte(16.0, tokens=10, size=20) == 2
    assert bits_per_byte(256.0, tokens=5, size=20) == 2


def test_counts_of_pairs_and_of_tokens_alone():
    train = torch.tensor([1, 2, 1, 2, 1, 3])
    found = baselines(train, torch.tensor([1, 2]))
    alone = 3 / (6 + VOCABULARY)  # 2 was there twice
    assert found["unigram"] == pytest.approx(1 / alone)
    assert found["bigram"] == pytest.approx(3 / (2 - 0.75 + 0.75 * 2 * alone))  # behind 1: 2, 2, 3
    unseen = baselines(train, torch.tensor([9, 2]))
    assert unseen["bigram"] == pytest.approx(1 / alone)


def test_the_checkpoints_are_small():
    assert sum(checkpoint(name).stat().st_size for name in ACTIVATIONS) < 12_000_000
    assert recall.CHECKPOINT.stat().st_size < 1_000_000


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_checkpoint_has_the_perplexity_that_was_recorded(models, held_out, activation):
    found = perplexity(models[activation], held_out, 4, WINDOW, 8)
    same = corpus(held_out=True).digest == DIGEST
    assert found == pytest.approx(RECORDED[activation], rel=0.002 if same else 0.25)


def test_the_perplexity_comes_from_the_weights_and_from_what_was_read(models, held_out):
    good = perplexity(models["silu"], held_out, 4, WINDOW, 4)
    broken = load()
    for layer in broken.model.layers:
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    assert perplexity(broken, held_out, 4, WINDOW, 4) > 1.5 * good
    assert perplexity(models["silu"], held_out[torch.randperm(len(held_out))], 4, WINDOW, 4) > 3 * good
    assert math.log(perplexity(build(), held_out, 4, WINDOW, 4)) > 0.95 * math.log(VOCABULARY)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="one of silu, relu, not 'gelu'"):
        build("gelu")


def test_the_examples_are_of_the_size_asked_for():
    for made in (example(batch=3), recall.example(batch=3)):
        assert len(made[2]["input_ids"]) == 3


# --- recall -------------------------------------------------------------------------------------------------------


def test_every_question_is_answered_once_in_its_context():
    some = pairs(50, seed=4)
    assert some.input_ids.shape == (50, LENGTH)
    for ids, where, value in zip(some.input_ids, some.where, some.value, strict=True):
        keys = ids[where].tolist()
        assert len(set(keys)) == PAIRS
        assert set(keys) <= set(KEYS)
        assert set(value.tolist()) <= set(VALUES)
        assert where.min() >= CONTEXT
        assert torch.equal(ids[where + 1], value)  # said, and read by what follows
        for key, right in zip(keys, value.tolist(), strict=True):
            (told,) = (ids[:CONTEXT] == key).nonzero().flatten().tolist()
            assert ids[told + 1] == right
        assert sum(word in FILLER for word in ids.tolist()) == LENGTH - 4 * PAIRS


def test_what_is_asked_is_seeded_and_near_more_often_than_far():
    assert torch.equal(pairs(5, seed=1).input_ids, pairs(5, seed=1).input_ids)
    assert not torch.equal(pairs(5, seed=1).input_ids, pairs(5, seed=2).input_ids)
    often = pairs(500, number=2).where.flatten().bincount(minlength=LENGTH)[CONTEXT::2]
    assert often[0] > 3 * often[-1]


def test_recall_counts_right_words():
    few = pairs(3)
    right = few.input_ids.roll(-1, 1)
    batches = iter(right.split(2))

    def model(input_ids, use_cache):
        return SimpleNamespace(logits=F.one_hot(next(batches), 128))

    assert recall.recall(model, few, batch=2) == 1
    right[0, few.where[0, :6]] = 0
    batches = iter(right.split(2))
    assert recall.recall(model, few, batch=2) == 0.75


def test_the_model_recalls(models):
    assert recall.recall(models["recall"], pairs(50, seed=6)) > 0.95
    for number in (4, 6):
        assert recall.recall(models["recall"], pairs(25, seed=7, number=number)) > 0.95


def test_recall_comes_from_the_weights_and_from_the_context(models):
    some = pairs(25, seed=8)
    assert recall.recall(recall.build().eval(), some) < 0.1
    some.input_ids[:, :CONTEXT] = FILLER.start
    assert recall.recall(models["recall"], some) < 0.3


# --- the table ----------------------------------------------------------------------------------------------------


def test_every_registered_recipe_can_be_read_and_what_is_not_registered_is_left_out(monkeypatch):
    rows = recipes()
    assert {row.level for row in rows} == {0, *LEVELS}
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        if row.method in table.RECIPES:
            assert parse_recipe(row.recipe).methods
    monkeypatch.setattr(tokred, "methods", lambda: {"fastv": None})
    methods = [row.method for row in recipes((70,))]
    assert methods == ["dense", "dense", *table.BY_HAND, "fastv"]
    assert recipes((70,))[-1].recipe == "fastv(layer=1, keep=0.3)"


@pytest.mark.parametrize("name", table.BY_HAND)
def test_by_hand_the_share_asked_for_is_left_out_and_the_model_is_given_back(models, name):
    model = models["recall"]
    ids = pairs(4).input_ids
    with torch.no_grad():
        plain = model(ids).logits
        counter = table.LeftOut(model)
        with by_hand(model, name, 0.75), counter:
            changed = model(ids).logits
        with by_hand(model, name, 0.0):
            torch.testing.assert_close(model(ids).logits, plain)
        torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
    assert counter.computed == ids.numel() * 2 * 256 // 4
    assert (changed - plain).abs().max() > 0.01


def test_the_largest_neurons_are_the_ones_that_stay():
    values = torch.tensor([[0.5, -3.0, 2.0, 0.1]])
    assert table._largest(0.5, values, torch.Generator()).tolist() == [[0, -3, 2, 0]]


def test_neurons_of_a_relu_are_counted_as_left_out(models):
    ids = torch.randint(VOCABULARY, (1, 32), generator=torch.Generator().manual_seed(0))
    counters = {name: table.LeftOut(models[name]) for name in ACTIVATIONS}
    with torch.no_grad():
        for name, counter in counters.items():
            with counter:
                models[name](ids)
    assert counters["silu"].computed == table._neurons(models["silu"], 32)
    assert counters["relu"].computed < 0.9 * table._neurons(models["relu"], 32)


@pytest.mark.slow
def test_a_row_of_a_token_method_counts_the_rows_that_are_gone(models, held_out):
    few = pairs(BATCH, seed=9)
    (row,) = [row for row in recipes((50,)) if row.method == "random"]
    scored = score(models, held_out, few, row)
    assert scored.perplexity is None
    assert scored.left_out == pytest.approx(CONTEXT / 2 / LENGTH)
    assert scored.recall < 0.9
    assert next(cells(scored)) == ""


@pytest.mark.slow
def test_a_row_that_changes_nothing_scores_as_the_model_does(models, held_out, monkeypatch):
    monkeypatch.setattr(table, "SAMPLE", 4)
    few = pairs(BATCH, seed=9)
    row = score(models, held_out, few, Row("dense", 0, table.DENSE))
    assert row.recall == recall.recall(models["recall"], few)
    assert row.perplexity == perplexity(models["silu"], held_out, BATCH, WINDOW, 4)
    assert row.left_out == 0
    assert list(cells(row))[2:] == ["0%", "", ""]
