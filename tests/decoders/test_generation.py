"""generate() of a vision-language model: images are encoded in the prefill's own graph, where that can be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import tokred
from tests.decoders import oracle
from tests.decoders.models import GEMMA, IMAGE, LENGTH, SPAN, build, prompts
from tests.decoders.test_catp import two_images
from tokred.compiler.caches import Kept
from tokred.generation import PrunedLayer, _adopt, _columns_of_mask, with_pruned_caches

pytestmark = pytest.mark.usefixtures("fresh")


def generated(model: Any, inputs: dict[str, Any], steps: int, **options: Any) -> list[list[int]]:
    given = {key: value for key, value in inputs.items() if key != "position_ids"}
    rows = model.generate(**given, do_sample=False, max_new_tokens=steps, suppress_tokens=[IMAGE], **options)
    found: list[list[int]] = rows[:, inputs["input_ids"].shape[1] :].tolist()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["visionzip(keep=0.5)", "correlation(keep=0.5)", "zoo_prune(keep=0.5, probes=2)"])
def test_a_method_that_looks_at_the_encoder_acts_in_generate(recipe: str) -> None:
    inputs = prompts(3, model="llava")
    model = tokred.compile(build("llava", layers=2), recipe, lower="eager")
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    logits[:, IMAGE] = -torch.inf
    tokred.reset()
    assert generated(model, inputs, 1) == logits.argmax(-1, keepdim=True).tolist()
    (prefill,) = tokred.reports().graphs
    (cut,) = [block for block in prefill.blocks if block.method]
    assert cut.refusal is None and cut.tokens[0] == LENGTH > cut.tokens[1]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
def test_repeated_samples_keep_their_own_images(options: dict[str, int]) -> None:
    inputs = two_images(2)  # two images a sample, so that repeating images one by one would mix them up
    model = build("llava", layers=2)
    assert generated(tokred.compile(model, lower="eager"), inputs, 6, **options) == generated(
        model, inputs, 6, **options
    )


@pytest.mark.slow
def test_a_forward_that_returns_a_tuple_prunes_its_caches_as_well() -> None:
    inputs = prompts(2, model="llava")
    model = tokred.compile(build("llava", layers=3), "fastv(layer=1, keep=0.5)", lower="eager")
    with torch.no_grad():
        (cache,) = [part for part in model(**inputs, return_dict=False) if isinstance(part, hf.DynamicCache)]
    assert [isinstance(layer, PrunedLayer) for layer in cache.layers] == [False, True, True]


@pytest.mark.slow
def test_an_encoder_decoder_that_sees_encodes_ahead() -> None:
    text = {"vocab_size": 99, "hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    vision = {"hidden_size": 32, "d_ff": 48, "d_kv": 8, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = hf.Pix2StructConfig(
        text_config=text | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None},
        vision_config=vision | {"num_attention_heads": 4, "seq_len": 16},
    )
    model = hf.Pix2StructForConditionalGeneration(config).eval()
    patches = torch.randn(2, 9, 770)
    patches[..., 0], patches[..., 1] = torch.arange(9) // 3 + 1, torch.arange(9) % 3 + 1
    given: dict[str, Any] = {"flattened_patches": patches, "attention_mask": torch.ones(2, 9)}
    given |= {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(tokred.compile(model, lower="eager").generate(**given), model.generate(**given))


@pytest.mark.slow
def test_a_cache_that_is_reset_holds_another_prompt() -> None:
    """Of another batch, and without an image: what the last prompt lost is none of its business."""
    first, inputs = prompts(3, model="llava"), prompts(2)
    model = tokred.compile(build("llava", layers=3), "fastv(layer=1, keep=0.5)", lower="eager")
    with torch.no_grad():
        cache = model(**first).past_key_values
        cache.reset()
        got = model(**inputs, past_key_values=cache).logits
        wanted = build("llava", layers=3)(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert cache.get_seq_length(2) == LENGTH and cache.layers[2].columns(LENGTH).tolist() == [[*range(LENGTH)]] * 2
    assert (got - wanted)[real].abs().max() < 1e-9 * wanted.abs().max()


def test_past_a_sliding_window_masks_are_read_with_their_offset() -> None:
    """A window of 28, a prompt of 26: layers that lost nothing soon hold the last 27 keys, and so long is the mask."""
    kinds = {"sliding_window": 28, "num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 4}
    torch.manual_seed(7)
    plain = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA | kinds)).double().eval()
    fast = copy.deepcopy(plain)
    plain.set_attn_implementation("oracle")
    with_pruned_caches(fast, lambda forward: forward)  # not compiled, but it has the hooks
    inputs = prompts()
    rows = torch.tensor([[*range(9), *range(15, LENGTH)]] * 3)
    gone = torch.ones(3, LENGTH, dtype=torch.bool).scatter(1, rows, False)
    with torch.no_grad(), oracle.masked({2: gone}):
        whole = plain(**inputs).past_key_values
    short = copy.deepcopy(whole)
    for layer in short.layers[2:]:
        layer.keys, layer.values = (x[:, :, rows[0]] for x in (layer.keys, layer.values))
    _adopt(short, [Kept(layer.keys, rows, LENGTH) for layer in short.layers[2:]])
    mask = inputs["attention_mask"]
    for length in range(LENGTH + 1, LENGTH + 6):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        step = {"input_ids": torch.full((3, 1), length), "position_ids": mask.sum(1, keepdim=True) - 1}
        with torch.no_grad(), oracle.masked({2: gone[:, max(length - 28, 0) :]}):
            wanted = plain(**step, attention_mask=mask, past_key_values=whole).logits
            got = fast(**step, attention_mask=mask, past_key_values=short).logits
        assert (got - wanted).abs().max() < 1e-9 * wanted.abs().max(), length
    assert whole.layers[2].keys.shape[2] == 27 and short.layers[2].keys.shape[2] == 20 + 5


def test_a_call_does_not_look_through_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks are installed once: generate() calls the model for every token."""
    fast = with_pruned_caches(build("llama", layers=1), lambda forward: forward)

    def walk(module: torch.nn.Module) -> Any:
        raise AssertionError(f"{type(module).__name__} is looked through")

    monkeypatch.setattr(torch.nn.Module, "named_modules", walk)
    with torch.no_grad():
        assert fast(**prompts()).logits.shape[1] == LENGTH


def pruned(rows: list[list[int]], tokens: int) -> PrunedLayer:
    """A layer with a key for each of these rows of a prompt, and one for a token behind it; keys say whose they are."""
    layer: Any = PrunedLayer()  # type: ignore[no-untyped-call]
    layer.rows, layer.dropped = torch.tensor(rows), tokens - len(rows[0])
    layer.keys = torch.cat([layer.rows, torch.full((len(rows), 1), tokens)], 1)[:, None, :, None].double()
    layer.values, layer.is_initialized, layer.dtype, layer.device = layer.keys.clone(), True, torch.float64, "cpu"
    return layer  # type: ignore[no-any-return]


def test_rows_go_where_their_keys_go() -> None:
    layer = pruned([[0, 2], [1, 3]], tokens=5)
    assert layer.get_seq_length() == 6
    for change in (
        lambda: layer.batch_repeat_interleave(2),
        lambda: layer.reorder_cache(torch.tensor([3, 1, 0, 2])),
        lambda: layer.batch_select_indices(torch.tensor([0, 1, 3])),
    ):
        change()
        assert torch.equal(layer.columns(6), layer.keys[:, 0, :, 0].long())
    assert layer.rows.tolist() == [[1, 3], [0, 2], [1, 3]]
    layer.crop(-1)
    assert layer.get_seq_length() == 5
    with pytest.raises(ValueError, match="cannot be cropped"):
        layer.crop(-1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_a_mask_of_a_window_hides_what_lies_before_it(dtype: torch.dtype) -> None:
    """It has columns for the last three of six tokens; of the layer's keys two are older."""
    layer, attention = pruned([[0, 2]], tokens=5), torch.nn.Module()
    attention.layer_idx = 0  # type: ignore[assignment]
    cache = hf.DynamicCache()
    cache.layers = [layer]
    seen, hidden = (True, False) if dtype == torch.bool else (0.0, torch.finfo(dtype).min)
    layer.keys, layer.values = layer.keys[:, :, :2], layer.values[:, :, :2]  # the token that comes now is no key yet
    mask = torch.full((1, 1, 1, 3), seen, dtype=dtype)
    _, given = _columns_of_mask(attention, (), {"attention_mask": mask, "past_key_values": cache})
    assert given["attention_mask"].flatten().tolist() == [hidden, hidden, seen]


@pytest.mark.slow
def test_beams_behind_a_pruned_prefill_are_those_behind_masked_keys() -> None:
    inputs, plain = prompts(), build("llama", layers=3)
    plain.set_attn_implementation("oracle")
    places = torch.arange(LENGTH).expand_as(inputs["input_ids"])
    gone = oracle.fastv(1, 0.5)(plain, inputs, (places >= SPAN[0]) & (places < SPAN[1]))
    given: dict[str, Any] = {"attention_mask": inputs["attention_mask"], "num_beams": 3, "max_new_tokens": 8}

    def generated(model: Any) -> Tensor:
        ids: Tensor = model.generate(inputs["input_ids"], do_sample=False, **given)
        return ids

    with oracle.masked({layer: rows.repeat_interleave(3, 0) for layer, rows in gone.items()}):
        wanted = generated(plain)
    model = tokred.compile(build("llama", layers=3), "fastv(layer=1, keep=0.5)", lower="eager", spans={"visual": SPAN})
    assert torch.equal(generated(model), wanted)
    assert not torch.equal(generated(plain), wanted), "what is dropped makes no difference"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_in_bfloat16_a_prompt_and_a_step_are_close_to_masked_keys(name: str) -> None:
    """Which tokens stay is tokred's choice here: in bfloat16 scores are often the same."""
    dtype = torch.bfloat16
    inputs: dict[str, Any] = prompts(3, model=name)
    inputs |= {"pixel_values": inputs["pixel_values"].to(dtype)} if name == "llava" else {}
    plain = build(name, dtype, layers=3)
    plain.set_attn_implementation({"text_config": "oracle"} if name == "llava" else "oracle")
    spans = {} if name == "llava" else {"spans": {"visual": SPAN}}
    model = tokred.compile(build(name, dtype, layers=3), "fastv(layer=1, keep=0.5)", lower="eager", **spans)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    step = {"input_ids": torch.full((3, 1), 7), "attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
    with torch.no_grad():
        first = model(**inputs)
        rows = first.past_key_values.layers[1].rows
        gone = torch.ones(3, LENGTH, dtype=torch.bool).scatter(1, rows, False)
        with oracle.masked({1: gone}):
            wanted = plain(**inputs)
            last = plain(**step, past_key_values=wanted.past_key_values).logits
        got = model(**step, past_key_values=first.past_key_values).logits
    assert rows.shape[1] < LENGTH and {first.logits.dtype, got.dtype} == {dtype}
    assert (first.logits[:, -1] - wanted.logits[:, -1]).abs().max() < 3e-2 * wanted.logits.abs().max()
    assert (got - last).abs().max() < 3e-2 * last.abs().max()
