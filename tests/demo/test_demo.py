"""The demo's model and data: what the table stands on. The table itself is run by `make demo`."""

import json
import signal

import pytest
import torch

from tokred.demo.data import digits, split
from tokred.demo.model import CHECKPOINT, example, load
from tokred.demo.run import DENSE, Row, _warming, plot_rows, write_json
from tokred.demo.train import accuracy, augment

FIRST_HELD_OUT = [
    10,
    21,
    24,
    25,
    28,
    32,
    34,
    35,
]  # a scikit-learn that splits otherwise would be noticed


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_split_is_disjoint_complete_and_stratified():
    train, held_out = split()
    assert (len(train), len(held_out)) == (1257, 540)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(1797))
    counts = digits(held_out)[1].bincount(minlength=10)
    assert counts.min() >= 52
    assert counts.max() <= 55


def test_the_split_is_the_one_that_the_checkpoint_was_trained_with():
    assert split()[1][:8].tolist() == FIRST_HELD_OUT


def test_images_are_upscaled_and_centred():
    images, labels = digits(torch.tensor([0, 1, 2]))
    assert images.shape == (3, 1, 32, 32)
    assert labels.tolist() == [0, 1, 2]  # the data set begins with the digits in order
    assert images.min() == -1
    assert images.max() <= 1


def test_the_checkpoint_is_small_and_accurate():
    assert CHECKPOINT.stat().st_size < 2_000_000
    assert accuracy(load(), *digits(split()[1])) >= 0.97


def test_the_accuracy_comes_from_the_weights():
    model = load()
    torch.nn.init.zeros_(model.blocks[0].qkv.weight)
    images, labels = digits(split()[1][:108])
    assert accuracy(model, images, labels) < accuracy(load(), images, labels)


def test_the_model_has_64_patch_tokens_and_a_class_token():
    model, (images,), keywords = example(batch=2)
    seen = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert model(images, **keywords).shape == (2, 10)
    assert seen == [(2, 65, 128)]


def test_augmentation_is_seeded_and_keeps_the_background():
    images = -torch.ones(4, 1, 32, 32)
    images[:, :, 12:20, 12:20] = 1.0
    first, second = (augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, images)
    assert torch.equal(first[:, :, 0, 0], images[:, :, 0, 0])


def test_rows_are_written_as_json_and_as_a_plot(tmp_path):
    rows = [
        Row(DENSE, DENSE, 0.98, 65, 65.0, 1.0),
        Row("tome", "tome(r=8)", 0.97, 17, 40.0, 0.6, 1.5),
        Row("tome", "tome(r=4)", 0.98, 41, 50.0, 0.8, 1.2),
    ]
    written = json.loads(write_json(rows, tmp_path / "demo.json").read_text())
    assert [row["recipe"] for row in written["rows"]] == [DENSE, "tome(r=8)", "tome(r=4)"]
    assert written["rows"][1]["speed"] == 1.5
    assert plot_rows(rows, tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_second_process_ends_with_the_block():
    with _warming(["norm(keep=0.5)"]) as process:
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL
