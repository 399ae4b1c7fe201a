"""What cannot be pruned in a decoder is refused or an error, never wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch._dynamo.exc import BackendCompilerFailed

import tokred
from tests.decoders.models import IMAGE, LENGTH, SIZES, SPAN, VISION, build, prompts
from tokred.errors import OptionError
from tokred.generation import PrunedLayer
from tokred.testing import TinyViT

VISUAL = {"spans": {"visual": SPAN}}
THREE = SIZES | {"num_hidden_layers": 3}


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh")]


def refusals(model: Any, recipe: str, options: dict[str, Any]) -> list[str]:
    """The refusals' codes; the compiled model's output is the model's own."""
    compiled = torch.compile(model, backend="tokred", options={"recipe": recipe, "lower": "eager", **options})
    inputs = prompts()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits[real], model(**inputs).logits[real], rtol=1e-9, atol=1e-9)
    return [block.refusal.code for graph in tokred.reports().graphs for block in graph.blocks if block.refusal]


@pytest.mark.parametrize(("name", "options", "found"), [("llava", {}, "masked_scatter"), ("llama", VISUAL, "options")])
def test_the_report_says_what_the_span_was_found_from(name: str, options: dict[str, Any], found: str) -> None:
    compiled = tokred.compile(build(name, layers=3), "fastv(layer=2, keep=0.5)", lower="eager", **options)
    with torch.no_grad():
        compiled(**prompts(model=name))
    blocks = [block for graph in tokred.reports().graphs for block in graph.blocks]
    (acted,) = [block for block in blocks if block.method and not block.refusal]
    assert acted.note.startswith(f"visual rows from {found}")


def test_without_a_visual_span_there_is_nothing_to_drop() -> None:
    assert refusals(build("llama", layers=3), "fastv()", {}) == ["no-visual-span"]


def test_the_layer_before_the_first_has_no_attention() -> None:
    assert refusals(build("llama", layers=3), "fastv(layer=0)", VISUAL) == ["no-previous-layer"]


def test_layer_0_s_cache_stays_whole_where_positions_are_read_off_it() -> None:
    assert refusals(build("llama", layers=3), "pyramiddrop(layers=[0])", VISUAL) == ["first-cache"]


def test_a_cache_that_is_a_window_long_stays_whole() -> None:
    config = hf.MistralConfig(**THREE, sliding_window=8)
    torch.manual_seed(0)
    model = hf.MistralForCausalLM(config).double().eval()
    assert set(refusals(model, "fastv()", VISUAL)) == {"sliding-cache"}


def test_a_static_cache_is_left_as_it_is() -> None:
    model, inputs = build("llama", layers=3), prompts()
    compiled = tokred.compile(model, "fastv()", lower="eager", **VISUAL)
    outputs = []
    for function in (compiled, model):
        cache = hf.StaticCache(config=model.config, max_cache_len=LENGTH + 4)
        with torch.no_grad():
            outputs.append(function(**inputs, past_key_values=cache).logits[inputs["attention_mask"].bool()])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
    blocks = [block for graph in tokred.reports().graphs for block in graph.blocks if block.kind == "attention"]
    assert blocks and all(block.refusal and block.refusal.code == "static-cache" for block in blocks)


def test_steps_that_extend_a_cache_are_no_failure_under_strict_and_verify() -> None:
    compiled = tokred.compile(build("llama", layers=3), "fastv()", lower="eager", strict=True, verify=True, **VISUAL)
    inputs = prompts()
    ids = compiled.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=3)
    assert ids.shape == (3, LENGTH + 3)
    codes = {b.refusal.code for graph in tokred.reports().graphs[1:] for b in graph.blocks if b.refusal}
    assert codes == {"decode"}


def test_all_tokens_of_a_sequence_are_never_dropped() -> None:
    assert refusals(build("llama", layers=3), "fastv(keep=0.01)", {"spans": {"visual": (0, LENGTH)}}) == [
        "nothing-left"
    ]


def test_all_tokens_of_an_image_may_be_dropped() -> None:
    inputs = prompts(2, model="llava")
    with torch.no_grad():
        output = tokred.compile(build("llava", layers=3), "fastv(keep=0.01)", lower="eager")(
            **inputs
        )  # round(0.16) of 16
    text = [row.nonzero().squeeze(-1).tolist() for row in inputs["input_ids"] != IMAGE]
    assert [layer.rows.tolist() for layer in output.past_key_values.layers[2:]] == [text]
    assert output.logits.shape[1] == LENGTH and bool(output.logits.isfinite().all())


def test_a_prompt_without_an_image_has_no_visual_span() -> None:
    model, inputs = build("llava", layers=3), prompts(2)  # no image tokens and no pixels
    with torch.no_grad():
        logits = tokred.compile(model, "fastv(keep=0.5)", lower="eager")(**inputs).logits
        assert torch.equal(logits, model(**inputs).logits)
    blocks = [block for graph in tokred.reports().graphs for block in graph.blocks if block.refusal]
    assert [block.refusal.code for block in blocks if block.refusal] == ["no-visual-span"]


@pytest.mark.parametrize("options", [{}, {"spans": {"visual": (1, 17)}}])
def test_methods_that_read_a_prompt_are_refused_in_an_image_encoder(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = hf.ViTModel(hf.ViTConfig(**VISION | {"num_hidden_layers": 4})).double().eval()
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        result = tokred.compile(model, "fastv()", lower="eager", exact=False, **options)(pixels).last_hidden_state
        assert torch.equal(result, model(pixels).last_hidden_state)
    blocks = [block for graph in tokred.reports().graphs for block in graph.blocks if block.refusal]
    assert [block.refusal.code for block in blocks if block.refusal] == ["no-visual-span"]


def test_in_a_vit_s_last_layer_the_missing_image_is_the_reason_and_liveness_still_acts() -> None:
    class ClassTokenOnly(TinyViT):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(pixels)["logits"]

    report = tokred.explain(ClassTokenOnly().eval(), torch.randn(2, 3, 12, 12), recipe="fastv(layer=2)")
    (graph,) = report.graphs
    assert [block.refusal.code for block in graph.blocks if block.refusal] == ["no-visual-span"]
    assert [entry.changes > 0 for entry in graph.passes if entry.name == "drop_dead_tokens"] == [True]


def test_a_model_that_cannot_be_traced_whole_is_traced_in_pieces() -> None:
    """Qwen2-VL reads lengths as numbers and splits by them: with Dynamo's flags for that, tracing fails."""
    text = THREE | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    special = {"image_token_id": IMAGE, "video_token_id": 95, "vision_start_token_id": 96, "vision_end_token_id": 97}
    torch.manual_seed(0)
    config = hf.Qwen2VLConfig(text_config=text, vision_config=vision, **special)
    model = hf.Qwen2VLForConditionalGeneration(config).double().eval()
    ids = torch.randint(3, 90, (1, 10))
    ids[0, 2:6] = IMAGE
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    with torch.no_grad():
        logits = tokred.compile(model, "fastv(keep=0.5)", lower="eager")(**inputs).logits
        torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-9, atol=1e-9)
    compiled = [block.module for graph in tokred.reports().graphs for block in graph.blocks]
    explained = [
        block.module
        for graph in tokred.explain(model, recipe="fastv(keep=0.5)", **inputs).graphs
        for block in graph.blocks
    ]
    assert explained == compiled and len(compiled) >= 2 * THREE["num_hidden_layers"]


def test_samples_with_different_numbers_of_image_tokens_are_an_error() -> None:
    inputs = prompts(2, model="llava")
    ids = inputs["input_ids"]
    ids[0, 20], ids[1, (ids[1] == IMAGE).nonzero()[0]] = IMAGE, 5  # 17 and 15, and as many features as before
    compiled = tokred.compile(build("llava", layers=3), "fastv(keep=0.5)", lower="eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match="different numbers of image tokens"):
        compiled(**inputs)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"visual": (9, 9)}, "not"),
        ({"visual": (9,)}, "not"),
        ({"visual": (True, 9)}, "not"),
        ({"visul": (3, 9)}, "Did you mean 'visual'"),
        ([(3, 9)], "a dict"),
    ],
)
def test_spans_that_cannot_be_are_errors(spans: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tokred.explain(build("llama", layers=3), **prompts(), recipe="fastv()", options={"spans": spans})


def test_a_span_behind_the_sequence_is_an_error() -> None:
    with pytest.raises(BackendCompilerFailed, match="OptionError: option spans: visual rows 9:27 of a sequence of 26"):
        tokred.explain(
            build("llama", layers=3), **prompts(), recipe="fastv()", options={"spans": {"visual": (9, LENGTH + 1)}}
        )


def test_beams_reorder_what_a_pruned_layer_knows() -> None:
    layer = PrunedLayer()
    layer.keys = layer.values = torch.randn(2, 1, 4, 8)
    layer.is_initialized, layer.device = True, torch.device("cpu")
    layer.rows, layer.dropped = torch.tensor([[0, 2, 5], [1, 2, 3]]), 3
    assert layer.get_seq_length() == 7
    assert layer.columns(7).tolist() == [[0, 2, 5, 6], [1, 2, 3, 6]]
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.rows.tolist() == [[1, 2, 3], [1, 2, 3]]
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    assert layer.columns(6).tolist() == [[1, 2, 3]] * 2
    with pytest.raises(ValueError, match="cannot be cropped"):
        layer.crop(-2)


def test_sequences_sampled_from_one_prompt_have_its_caches() -> None:
    """Of the most probable token alone: what is sampled is known then."""
    ids, mask = (prompts()[name] for name in ("input_ids", "attention_mask"))
    compiled = tokred.compile(build("llama", layers=3), "fastv(layer=2, keep=0.5)", lower="eager", **VISUAL)
    given: dict[str, Any] = {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "max_new_tokens": 4}
    sampled = compiled.generate(ids, attention_mask=mask, **given)
    twice, given = ids.repeat_interleave(2, 0), {"attention_mask": mask.repeat_interleave(2, 0), "max_new_tokens": 4}
    assert torch.equal(sampled, compiled.generate(twice, do_sample=False, **given))
