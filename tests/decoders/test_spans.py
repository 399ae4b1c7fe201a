"""Spans: every way to say which rows are the image's means the same, and from them follows what should."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers as hf
from torch import Tensor

import tokred
from tests.compiler.graphs import captured
from tests.decoders import oracle
from tests.decoders.models import IMAGE, LENGTH, PATCHES, SIZES, build, prompts
from tokred import Keep, Reduction
from tokred.compiler.axes import Axes
from tokred.compiler.blocks import find_blocks
from tokred.compiler.options import parse_options
from tokred.compiler.spans import Spans
from tokred.errors import OptionError
from tokred.registry.spans import derived

pytestmark = pytest.mark.usefixtures("fresh")


def small() -> Any:
    """Three layers of Llama."""
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | {"num_hidden_layers": 3})).double().eval()


def marked(batch: int = 3) -> dict[str, Tensor]:
    """A text decoder's prompts with 16 tokens in each, behind 0, 3, 6 tokens of padding and a word, that are IMAGE."""
    inputs = prompts(batch, model="llava")
    del inputs["pixel_values"]
    return inputs


def image_tokens(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["input_ids"] == IMAGE


def codes() -> list[str]:
    return [b.refusal.code for graph in tokred.reports().graphs for b in graph.blocks if b.method and b.refusal]


# -- every way to say where the image is ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "found"),
    [
        (IMAGE, f"input_ids equal to {IMAGE}"),
        (image_tokens, "the callable image_tokens"),
        (marked()["input_ids"] == IMAGE, "options, a mask"),
    ],
)
def test_rows_at_other_places_in_each_sample_are_the_image_s(given: Any, found: str) -> None:
    inputs = marked()
    plain = small()
    plain.set_attn_implementation("oracle")
    dropped = oracle.fastv(1, 0.5)(plain, inputs, image_tokens(inputs))
    left = [row.nonzero().squeeze(-1).tolist() for row in ~dropped[1]]
    model = tokred.compile(small(), "fastv(layer=1, keep=0.5)", lower="eager", strict=True, spans={"visual": given})
    with torch.no_grad():
        output = model(**inputs)
    assert [layer.rows.tolist() for layer in output.past_key_values.layers[1:]] == [left] * 2
    (note,) = [b.note for graph in tokred.reports().graphs for b in graph.blocks if b.method]
    assert note.startswith(f"visual rows from {found}")


@pytest.mark.slow
def test_masks_that_are_given_do_not_recompile_with_each_token() -> None:
    inputs = marked()
    given = {key: value for key, value in inputs.items() if key != "position_ids"}
    model = tokred.compile(small(), "fastv(layer=1, keep=0.5)", lower="eager", spans={"visual": image_tokens(inputs)})
    model.generate(**given, do_sample=False, max_new_tokens=6)
    graphs = tokred.reports().graphs
    assert len(graphs) <= 3, "a graph for each step"
    assert not any(graph.notes for graph in graphs)
    assert sum(bool(b.method and not b.refusal) for graph in graphs for b in graph.blocks) == 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fastv(layer=1, keep=0.5)", "corematching(layer=1, keep=0.5)"])
def test_a_padded_sample_loses_alone_what_it_loses_in_its_batch(recipe: str) -> None:
    batch = {key: torch.stack([row.roll(-3 * n) for n, row in enumerate(x)]) for key, x in marked().items()}
    found = []
    for inputs in (batch, {key: x[2:] for key, x in batch.items()}):  # six tokens of padding, now behind
        torch.compiler.reset()
        with torch.no_grad():
            model = tokred.compile(small(), recipe, lower="eager", strict=True, spans={"visual": IMAGE})
            found.append([layer.rows[-1].tolist() for layer in model(**inputs).past_key_values.layers[1:]])
    assert found[0] == found[1]


def test_samples_with_other_numbers_of_image_tokens_are_refused() -> None:
    inputs = marked()
    inputs["input_ids"][1, -1] = IMAGE
    model = small()
    with torch.no_grad():
        logits = tokred.compile(model, "fastv(layer=1)", lower="eager", spans={"visual": IMAGE})(**inputs).logits
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(logits[real], model(**inputs).logits[real], rtol=1e-9, atol=1e-9)
    assert codes() == ["ragged-images"]


@pytest.mark.slow
def test_another_number_of_image_tokens_later_on_is_an_error() -> None:
    inputs = marked()
    model = tokred.compile(small(), "fastv(layer=1)", lower="eager", spans={"visual": IMAGE})
    with torch.no_grad():
        model(**inputs)
        inputs["input_ids"][:, -1] = IMAGE
        with pytest.raises(RuntimeError, match="others than the 16"):
            model(**inputs)


@pytest.mark.slow
def test_a_prompt_without_the_image_s_token_has_no_visual_span() -> None:
    inputs = prompts()
    with torch.no_grad():
        tokred.compile(small(), "fastv(layer=1)", lower="eager", spans={"visual": 97 + 1})(**inputs)
    assert codes() == ["no-visual-span"]


# -- what the compiler makes of them ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph() -> Any:
    """A captured prefill: the graph, its first attention, its inputs."""
    inputs: list[Any] = []

    def keep(gm: Any, example_inputs: list[Any]) -> Any:
        inputs.append(example_inputs)
        return gm.forward

    (gm,) = captured(small(), **marked())
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(small(), backend=keep)(**marked())
    return gm, find_blocks(gm, Axes(gm.graph)).attentions[0], inputs[0]


def span(graph: Any, given: dict[str, Any], name: str = "visual") -> Any:
    gm, block, inputs = graph
    return Spans(gm, parse_options({"spans": given}).spans, inputs).of(block, name)


@pytest.mark.parametrize(
    ("given", "head", "tail"),
    [((9, 21), 9, 5), ((9, -5), 9, 5), ((-17, -5), 9, 5), ((9, None), 9, 0), ((None, -1), 0, 1)],
)
def test_rows_count_from_either_end(graph: Any, given: Any, head: int, tail: int) -> None:
    found = span(graph, {"visual": given})
    assert (found.head, found.tail, found.mask) == (head, tail, None)


@pytest.mark.parametrize(
    ("given", "count"),
    [(torch.arange(LENGTH) < 4, 4), (IMAGE, 16), (image_tokens, 16), (lambda inputs: torch.arange(LENGTH) < 4, 4)],
)
def test_masks_become_nodes_of_the_graph_for_every_sample(graph: Any, given: Any, count: int) -> None:
    found = span(graph, {"visual": given})
    meta = found.mask.meta["val"]
    assert (tuple(meta.shape), meta.dtype, found.count) == ((3, LENGTH), torch.bool, count)


def test_a_graph_in_which_nothing_acts_is_left_as_it_was(graph: Any) -> None:
    gm, block, inputs = graph
    before = list(gm.graph.nodes)
    spans = Spans(gm, {"visual": IMAGE, "text": torch.arange(LENGTH) > 22}, inputs)
    assert spans.of(block, "visual") and spans.of(block, "text")
    assert len(gm.graph.nodes) > len(before)
    spans.forget()
    assert list(gm.graph.nodes) == before


def raises(inputs: Any) -> Tensor:
    raise ValueError("no idea")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"visual": (9, 27)}, "visual rows 9:27 of a sequence of 26 tokens"),
        ({"visual": (-27, 9)}, "visual rows -27:9 of a sequence of 26"),
        ({"visual": (20, -6)}, "visual rows 20:-6 of a sequence of 26"),
        ({"visual": (26, None)}, "visual rows 26: of a sequence of 26"),
        ({"visual": torch.ones(25, dtype=torch.bool)}, r"shape \[25\], not \[26\] or \[3, 26\]"),
        ({"visual": torch.ones(2, 26, dtype=torch.bool)}, r"shape \[2, 26\], not"),
        ({"visual": torch.zeros(26, dtype=torch.bool)}, "without any row"),
        ({"visual": raises}, "the callable raises, raised ValueError: no idea"),
        ({"visual": lambda inputs: inputs["input_id"] == 3}, "no input 'input_id' here. Did you mean 'input_ids'"),
        ({"visual": lambda inputs: inputs["input_ids"]}, "a mask of torch.int64, not of torch.bool"),
        ({"visual": lambda inputs: inputs["input_ids"][:, 1:] == 3}, r"shape \[3, 25\]"),
        ({"visual": lambda inputs: [True] * 26}, "gave list and no mask"),
        ({"visual": (9, 21), "text": (20, 26)}, "visual and text rows overlap"),
        ({"visual": (9, 21), "text": torch.arange(26) > 19}, "visual and text rows overlap"),
    ],
)
def test_spans_that_are_none_of_this_sequence_are_errors(graph: Any, given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        span(graph, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"visual": (9, 9)}, "it is empty"),
        ({"visual": (-3, -3)}, "it is empty"),
        ({"visual": (3, 0)}, "it is empty"),
        ({"visual": (9, 2.5)}, "not"),
        ({"instructions": (3, 9)}, "Did you mean 'instruction'"),
        ({"visual": torch.ones(26)}, "torch.float32"),
        ({"visual": torch.ones(1, 1, 26, dtype=torch.bool)}, r"shape \[1, 1, 26\]"),
        ({"visual": "98"}, "'98', not two rows, a mask, a token id or a callable"),
        ({"visual": True}, "True, not two rows"),
    ],
)
def test_what_can_be_no_span_is_an_error_at_once(given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_options({"spans": given})


# -- what follows from them -------------------------------------------------------------------------------------------


def test_other_spans_follow_from_the_visual_one_and_the_padding() -> None:
    visual = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0]]).bool()
    valid = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    wanted = {
        "padding": [[0], [6, 7]],
        "text": [[1, 4, 6, 7], [0, 3, 4, 5]],
        "prefix": [[1], [0]],
        "instruction": [[6, 7], [3, 4, 5]],
    }
    for name, rows in wanted.items():
        assert [mask.nonzero().squeeze(-1).tolist() for mask in derived(name, visual, valid)] == rows, name
    numbers = [[-1, -1, 0, 0, -1, 1, -1, -1], [-1, 0, 0, -1, -1, -1, -1, -1]]
    assert derived("images", visual, valid).tolist() == numbers
    assert derived("images", visual, valid, per_image=1).tolist()[1] == [-1, 0, 1, -1, -1, -1, -1, -1]
    late = torch.arange(8).expand(2, -1) == 7
    assert torch.equal(derived("instruction", visual, valid, {"text": late}), late)
    assert derived("text", visual, None).sum() == 16 - 5


@dataclass(frozen=True)
class Reads(Reduction):
    """Drops the first half of the visual tokens, where each span is what this test's prompts say."""

    name: ClassVar[str] = "reads"
    needs = ("visual", "text", "prefix", "instruction", "images", "padding")
    scope = "layer"
    causal_safe = True

    def default_layers(self, depth: int) -> list[int]:
        return [1, 2]

    def removed(self, place: Any) -> Any:
        return PATCHES // 2 if place.layer == 1 else PATCHES // 4

    def plan(self, site: Any) -> Keep:
        row, gone = site.arange(0, site.tokens), site.whole - site.free
        first = 3 * torch.arange(site.batch).unsqueeze(1) + 1  # of the image
        wanted = {
            "padding": row < first - 1,
            "prefix": row == first - 1,
            "text": (row == first - 1) | (row >= first + site.free),
            "instruction": row >= first + site.free,
            "images": (row >= first) & (row < first + site.free),
        }
        for name, mask in wanted.items():
            found = site.spans[name] == 0 if name == "images" else site.spans[name]
            torch.ops.aten._assert_async.msg((found == mask).all(), f"{name}, {gone} gone")
        return site.keep_top(row.double(), site.free - self.removed(site))


@pytest.mark.slow
def test_a_method_reads_the_spans_it_asks_for_wherever_its_tokens_are() -> None:
    model = tokred.compile(build("llava"), Reads(), lower="eager", strict=True)
    with torch.no_grad():
        output = model(**prompts(3, model="llava"))
    kept = [layer.rows.shape[1] for layer in output.past_key_values.layers[1:]]
    assert kept == [LENGTH - 8] + [LENGTH - 12] * 3
    note = next(b.note for graph in tokred.reports().graphs for b in graph.blocks if b.method)
    assert "instruction rows from text behind the last visual row" in note
    assert "images rows from the encoder's 16 features of each" in note


@pytest.mark.slow
def test_text_that_meets_the_image_is_an_error() -> None:
    options: dict[str, Any] = {"lower": "eager", "spans": {"visual": IMAGE, "text": image_tokens}}
    compiled = tokred.compile(small(), "adaptinfer(keep=0.5, layers=[1])", **options)
    with torch.no_grad(), pytest.raises(RuntimeError, match="visual and text rows overlap"):
        compiled(**marked())


@pytest.mark.slow
def test_spans_that_need_an_image_are_refused_without_one() -> None:
    @dataclass(frozen=True)
    class Prefix(Reads):
        name: ClassVar[str] = "prefix"
        needs = ("prefix",)

    with torch.no_grad():
        tokred.compile(small(), Prefix(), lower="eager")(**prompts())
    assert codes() == ["no-visual-span"] * 2
