"""core_neurons against the same thing by hand: hooks on the eager model, which decodes with the prompt's set."""

from __future__ import annotations

import copy
from math import ceil
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import tokred
from tests.decoders.models import build, prompts
from tests.passes.sparse_models import TWO, example, linears, made, masking
from tests.passes.test_skip_weights import LoraLinear
from tokred.errors import ArgumentError
from tokred.registry.neurons import Neurons
from tokred.registry.recipe import parse_recipe

EXACT = 1e-9  # relative to the logits, in float64
ROUNDED = 3e-7  # generate() returns them in float32
DECODERS = ["llama", "mistral", "qwen3", "gemma3", "phi3", "gpt2", "opt"]


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh")]


def core_of(rows: list[Tensor], keep: float, token_keep: float) -> set[int]:
    """The definition, one token and one neuron after the other."""
    counts = [0] * len(rows[0])
    for row in rows:
        values = row.tolist()
        positive = sorted((i for i, value in enumerate(values) if value > 0), key=lambda i: -values[i])
        for neuron in positive[: ceil(token_keep * len(positive) - 1e-9)]:
            counts[neuron] += 1
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    return set(order[: max(round(keep * len(counts)), 1)])


def lasts(model: nn.Module) -> dict[str, nn.Module]:
    """The last linear of each MLP."""
    ends = ("down_proj.weight", "mlp.c_proj.weight", "fc2.weight", "output.dense.weight")
    found = {name: module for name, module in linears(model).items() if name.endswith(ends)}
    return {name: module for name, module in found.items() if "attention.output" not in name}


class ByHand:
    """Hooks on an eager model: prompts choose, and what is generated behind them is computed with what they chose.

    real    [B N] which rows of the next prompt are no padding; None for all
    whole   each text is computed with what it chose itself
    first   whether the next prompt starts anew; else it is more of the last one
    """

    def __init__(self, model: nn.Module, keep: float = 0.4, token_keep: float = 0.2, *, whole: bool = False) -> None:
        self.keep, self.token_keep, self.whole = keep, token_keep, whole
        self.real: Tensor | None = None
        self.first = True
        self.rows: dict[str, list[Tensor]] = {}
        self.batch = 1
        self.handles = [
            module.register_forward_pre_hook(lambda m, args, name=name: (self.hook(name, args[0]),))
            for name, module in lasts(model).items()
        ]

    def hook(self, name: str, x: Tensor) -> Tensor:
        tokens = x.shape[-2] if x.dim() == 3 else x.shape[0] // self.batch
        if tokens > 1 or self.whole:
            rows = x.reshape(-1, x.shape[-1])
            rows = rows if self.real is None else rows[self.real.flatten().bool()]
            self.rows[name] = list(rows) if self.first else [*self.rows[name], *rows]
            if not self.whole:
                return x
        kept = torch.zeros(x.shape[-1], dtype=x.dtype)
        kept[sorted(core_of(self.rows[name], self.keep, self.token_keep))] = 1
        return x * kept

    def __enter__(self) -> ByHand:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def by_hand(model: Any, inputs: dict[str, Tensor], tokens: int = 16, **options: Any) -> tuple[Tensor, Tensor]:
    """What the eager model generates with `core_neurons(layers=':')`."""
    with ByHand(model) as hands:
        hands.real, hands.batch = inputs.get("attention_mask"), len(inputs["input_ids"])
        return generated(model, inputs, tokens, **options)


def padded(name: str) -> dict[str, Tensor]:
    """Three prompts of 9, 6 and 4 tokens, padded on the left: with words, as token 0 is a vector of zeros."""
    ids = torch.cat([example(name), example(name, 5)[:1]])
    mask = (torch.arange(9) >= torch.tensor([[0], [3], [5]])).long()
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, inputs: dict[str, Tensor], tokens: int = 16, **options: Any) -> tuple[Tensor, Tensor]:
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **options}
    with torch.no_grad():
        done = model.generate(**inputs, max_new_tokens=tokens, **options)
    return done.sequences, torch.stack(done.logits, 1)


def fast(model: Any, recipe: str = "core_neurons(layers=':')", **options: Any) -> Any:
    return tokred.compile(model, recipe, fullgraph=True, **{"strict": True, "lower": "eager", **options})


def close(got: Any, wanted: Any, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float = ROUNDED) -> None:
    assert torch.equal(got[0], wanted[0])
    close(got[1], wanted[1], tolerance)


def logits(model: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


def mlps(number: int) -> list[Any]:
    return [row for row in tokred.reports().graphs[number].blocks if row.kind == "mlp"]


# -- generate() -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_a_padded_batch_decodes_with_what_its_prompts_chose(name: str) -> None:
    model, inputs = made(name), padded(name)
    dense, wanted = generated(model, inputs), by_hand(model, inputs)
    assert (dense[1] - wanted[1])[:, 1:].abs().max() > 1e-2 * wanted[1].abs().max()
    compiled = fast(model)
    same(generated(compiled, inputs), wanted)
    other = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    wanted_other = by_hand(model, other, tokens=6)
    assert not torch.equal(wanted_other[0][:, 9:], wanted[0][:, 9:15])
    same(generated(compiled, other, tokens=6), wanted_other)
    same(generated(compiled, inputs), wanted)
    assert len(tokred.reports().graphs) == 3  # the prompt, the first token, all others: as many as without a recipe
    assert [row.tokens[1] for row in mlps(0)] == [9, 9]  # the last layer votes with all, though one alone is read
    assert all(row.method and not row.refusal for number in range(3) for row in mlps(number))
    assert all(row.flops[0] == row.flops[1] and "all are computed" in row.note for row in mlps(0))
    most = 0.8 if name == "phi3" else 0.43  # of one product that became two the report counts the one that was
    assert all(0.37 < row.flops[1] / row.flops[0] < most for number in (1, 2) for row in mlps(number))
    assert not any("by masking" in row.note for number in (1, 2) for row in mlps(number))
    assert any("gathered behind it" in note for note in tokred.reports().graphs[1].notes)


def test_beams_change_places_and_the_set_stays() -> None:
    model, inputs = made("llama"), padded("llama")
    beams = {"num_beams": 2, "output_logits": False, "return_dict_in_generate": False}
    with ByHand(model) as hands, torch.no_grad():
        hands.real = inputs["attention_mask"].repeat_interleave(2, 0)
        wanted = model.generate(**inputs, max_new_tokens=6, do_sample=False, **beams)
    with torch.no_grad():
        dense = model.generate(**inputs, max_new_tokens=6, do_sample=False, **beams)
        got = fast(model).generate(**inputs, max_new_tokens=6, do_sample=False, **beams)
    assert torch.equal(got, wanted) and not torch.equal(got, dense)


def test_prompts_in_turns_and_new_weights() -> None:
    """Each cache has its own set; the weights are gathered again where another one comes in between, or new ones."""
    model, hooked, ids = made("llama"), made("llama"), example("llama")
    compiled = fast(model)
    prompts = [ids, example("llama", 1)]
    wanted = [by_hand(model, {"input_ids": prompt}, tokens=6) for prompt in prompts]
    assert not torch.equal(wanted[0][0][:, 9:], wanted[1][0][:, 9:])
    caches = [logits(compiled, prompt, use_cache=True).past_key_values for prompt in prompts]
    for step in range(4):
        for turn, each in zip(caches, wanted, strict=True):
            out = logits(compiled, each[0][:, 9 + step : 10 + step].clone(), past_key_values=turn)
            close(out.logits[:, -1].float(), each[1][:, step + 1], ROUNDED)
    cache = logits(compiled, ids, use_cache=True).past_key_values
    with ByHand(hooked):
        eager = logits(hooked, ids, use_cache=True).past_key_values
        for step in range(3):
            token = ids[:, step : step + 1].clone()
            wanted = logits(hooked, token, past_key_values=eager).logits
            close(logits(compiled, token, past_key_values=cache).logits, wanted)
            for each in (model, hooked):
                each.load_state_dict({name: value * 1.02 + 0.003 for name, value in each.state_dict().items()})
    assert len(tokred.reports().graphs) == 3


def test_a_prompt_in_parts_and_another_turn_vote_as_well() -> None:
    model, inputs = made("llama"), padded("llama")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    more = torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], 1)
    hooked = made("llama")
    with ByHand(hooked) as hands:
        outs: dict[int, list[Tensor]] = {}
        for number, run in enumerate((hooked, fast(model))):
            hands.real, hands.first = mask[:, :5], True
            cache = logits(run, ids[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
            hands.real, hands.first = mask[:, 5:], False
            outs[number] = [logits(run, ids[:, 5:], attention_mask=mask, past_key_values=cache).logits[mask[:, 5:] > 0]]
            for length in (10, 11, 12):
                token = ids[:, length - 6 : length - 5]
                outs[number].append(logits(run, token, attention_mask=more[:, :length], past_key_values=cache).logits)
    for got, wanted in zip(outs[1], outs[0], strict=True):
        close(got, wanted)
    assert [mlps(number)[0].refusal for number in range(3)] == [None] * 3


def test_a_prompt_of_one_token_chooses() -> None:
    model, ids = made("llama"), example("llama")[:1, :1]
    compiled = fast(model)
    cache = logits(compiled, ids, use_cache=True).past_key_values
    got = logits(compiled, ids + 1, past_key_values=cache).logits
    dense, rows = logits(model, ids, use_cache=True), dense_rows(model, ids)
    with ByHand(model) as hands:
        hands.rows = rows
        wanted = logits(model, ids + 1, past_key_values=dense.past_key_values).logits
    close(got, wanted)


def dense_rows(model: Any, ids: Tensor) -> dict[str, list[Tensor]]:
    """What the last linears read of a prompt that is computed as it is."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: found.update({name: list(args[0].flatten(0, -2))}))
        for name, module in lasts(model).items()
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


def test_other_methods_in_the_layers_between() -> None:
    """Whose extra inputs stand between those of this one."""
    model, inputs = build("llama", layers=4), padded("llama")
    layers = model.model.layers
    with ByHand(nn.ModuleList([layers[0], layers[2]])) as hands:
        hands.real = inputs["attention_mask"]
        layers[1].mlp.act_fn = copy.deepcopy(layers[1].mlp.act_fn)
        cut = {"1": layers[1].mlp.act_fn}
        with masking(cut, lambda _, x: x if x.shape[1] > 1 else torch.where(x.abs() > 0.2, x, 0.0), inputs=False):
            wanted = generated(model, inputs, tokens=4)
    recipe = "core_neurons(layers=[0, 2]) + cats(threshold=0.2, layers=[1])"
    same(generated(fast(model, recipe), inputs, tokens=4), wanted)
    names = [str(row.method).partition("(")[0] for row in mlps(1)]
    assert names == ["core_neurons", "cats", "core_neurons", "None"]
    cache = logits(model, inputs["input_ids"][:1], use_cache=True).past_key_values  # cats alone acts behind it
    with masking(cut, lambda _, x: torch.where(x.abs() > 0.2, x, 0.0), inputs=False):
        wanted_token = logits(model, inputs["input_ids"][:1, :1], past_key_values=copy.deepcopy(cache)).logits
    close(logits(fast(model, recipe), inputs["input_ids"][:1, :1], past_key_values=cache).logits, wanted_token)


def test_a_cache_that_no_compiled_prompt_filled_is_decoded_with_all_neurons(caplog: Any) -> None:
    model, ids = made("llama"), example("llama")
    compiled = fast(model)
    cache = logits(model, ids, use_cache=True).past_key_values
    again = copy.deepcopy(cache)
    for step in range(3):
        token = ids[:, step : step + 1]
        got = logits(compiled, token, past_key_values=cache).logits
        close(got, logits(model, token, past_key_values=again).logits)
    assert caplog.text.count("no compiled prompt filled this cache") == 2  # once a graph
    known = logits(compiled, ids, use_cache=True).past_key_values
    copied, other = copy.deepcopy(known), fast(model, "core_neurons(layers=':', keep=0.7)")
    token, graph = ids[:, :1], logits(model, ids, use_cache=True).past_key_values
    chosen = logits(compiled, token, past_key_values=known).logits
    close(logits(compiled, token, past_key_values=copied).logits, chosen, 1e-12)
    known.crop(-1)
    dense = logits(other, token, past_key_values=known).logits  # of another recipe
    close(dense, logits(model, token, past_key_values=graph).logits)
    assert (dense - chosen).abs().max() > 1e-3


def test_lora_branches_have_fewer_neurons_too() -> None:
    model, inputs = build("llama", layers=3), padded("llama")
    for layer, adapted in zip(model.model.layers, ("down_proj", "up_proj", "gate_proj"), strict=True):
        setattr(layer.mlp, adapted, LoraLinear(getattr(layer.mlp, adapted)).double())
    hooked: Any = copy.deepcopy(model)
    for layer in hooked.model.layers:  # all that reads the neurons
        layer.mlp.down_proj = nn.Sequential(nn.Identity(), layer.mlp.down_proj)
    with ByHand(nn.Identity()) as hands:
        hands.real = inputs["attention_mask"]
        for number, layer in enumerate(hooked.model.layers):
            layer.mlp.down_proj[0].register_forward_pre_hook(lambda m, args, n=number: (hands.hook(str(n), args[0]),))
        wanted = generated(hooked, inputs, tokens=3)
    same(generated(fast(model), inputs, tokens=3), wanted)
    assert all("by masking" not in row.note and row.flops[1] < 0.5 * row.flops[0] for row in mlps(1))
    assert len(mlps(1)) == 3


def test_weights_that_want_gradients_are_masked_instead() -> None:
    model, ids = made("llama"), example("llama")
    compiled = fast(model)
    cache = logits(compiled, ids, use_cache=True).past_key_values
    out = compiled(ids[:, :1], past_key_values=cache, use_cache=True)
    out.logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    assert all("by masking: the weight's gradient is wanted" in row.note for row in mlps(1))
    with ByHand(model):
        eager = logits(model, ids, use_cache=True).past_key_values
        close(out.logits.detach(), logits(model, ids[:, :1], past_key_values=eager).logits)


@pytest.mark.slow
def test_the_language_model_of_a_vlm_chooses_and_its_encoder_does_not() -> None:
    model, inputs = build("llava", layers=2), prompts(3, model="llava")
    inputs.pop("position_ids")
    with ByHand(model.model.language_model) as hands:
        hands.real = inputs["attention_mask"]
        wanted = generated(model, inputs, tokens=5)
    compiled = tokred.compile(model, "core_neurons(layers=':')", strict=True, lower="eager")
    same(generated(compiled, inputs, tokens=5), wanted)
    rows = {row.module: row for row in mlps(0)}
    assert all((row.refusal is None) == ("language_model" in name) for name, row in rows.items()), rows


@pytest.mark.slow
def test_through_inductor_and_verified() -> None:
    model, inputs = build("llama", torch.float32, layers=1), padded("llama")
    wanted = by_hand(model, inputs, tokens=5)
    same(generated(fast(model, lower="inductor", verify=True), inputs, tokens=5), wanted, 1e-4)


# -- whole texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DECODERS, "vit"])
def test_masked_it_is_the_definition_on_a_whole_text(name: str) -> None:
    model, inputs = made(name), {"pixel_values": example("vit")} if name == "vit" else padded(name)
    options = {"recipe": "core_neurons(keep=0.3, token_keep=0.4, phase='masked', layers=':')", "lower": "eager"}
    with ByHand(model, 0.3, 0.4, whole=True) as hands:
        hands.real = inputs.get("attention_mask")
        wanted = logits(model, **inputs)[0]
    compiled = torch.compile(model, backend="tokred", fullgraph=True, options={**options, "strict": True})
    got, dense = logits(compiled, **inputs)[0], logits(model, **inputs)[0]
    real = inputs.get("attention_mask", torch.ones(wanted.shape[:2])) > 0
    assert (wanted - dense)[real].abs().max() > 1e-3 * dense.abs().max()
    close(got[real], wanted[real])


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_without_tokred_compile_decoding_stays_dense() -> None:
    model, ids = made("llama"), example("llama")
    compiled = torch.compile(model, backend="tokred", options={"recipe": "core_neurons(layers=':')", "lower": "eager"})
    cache, again = (logits(run, ids, use_cache=True).past_key_values for run in (compiled, model))
    got = logits(compiled, ids[:, :1], past_key_values=cache).logits
    close(got, logits(model, ids[:, :1], past_key_values=again).logits, 1e-12)
    assert {row.refusal.code for number in (0, 1) for row in mlps(number)} == {"no-request"}


def test_a_cache_of_fixed_length_is_left_alone() -> None:
    model, ids = made("llama"), example("llama")
    compiled = fast(model, strict=False)
    with torch.no_grad():
        options: Any = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
        got, wanted = (run.generate(ids, **options) for run in (compiled, model))
    assert torch.equal(got, wanted)
    codes = {row.refusal.code for graph in tokred.reports().graphs for row in graph.blocks if row.kind == "mlp"}
    assert codes == {"static-cache"}


def test_a_last_layer_without_a_vote_computes_the_last_token() -> None:
    """The only one that is read. Where the layer votes liveness leaves it whole: see the padded batch."""
    model, inputs = made("llama"), padded("llama")
    generated(fast(model, "core_neurons(layers=[0])"), inputs, tokens=1)
    assert [row.tokens[1] for row in mlps(0)] == [9, 1]


def test_routed_experts_are_refused() -> None:
    sizes = TWO | {"num_hidden_layers": 1, "num_local_experts": 4}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes)).eval()
    logits(fast(model, strict=False), example("llama"))
    (row,) = mlps(0)
    assert (row.form, row.refusal.code) == ("routed", "experts")


@pytest.mark.parametrize("argument", ["keep=0", "ratio=1", "token_keep=0", "token_keep=1.5", "phase='prefill'"])
def test_arguments_out_of_range_are_errors(argument: str) -> None:
    with pytest.raises(ArgumentError, match=argument.partition("=")[0]):
        parse_recipe(f"core_neurons({argument})")


def test_layers_between_those_of_the_paper() -> None:
    method = parse_recipe("core_neurons").methods[0]
    assert method.default_layers(32) == list(range(6, 27))


def test_a_core_is_rounded_up_and_has_positive_numbers_alone() -> None:
    method = parse_recipe("core_neurons(keep=0.001, token_keep=0.28)").methods[0]
    numbers = torch.arange(1.0, 31)
    rows = [numbers.where(numbers > least, -numbers) for least in (5, 30, 28)]  # 25, 0 and 2 are positive
    assert method.votes(torch.stack(rows)).sum(-1).tolist() == [7, 0, 1]
    assert method.kept(Neurons(0, 1, "", "down", 30)) == 1
