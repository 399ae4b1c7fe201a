"""Decoding with operators that skip weights, against hooks that mask on the unmodified model."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import tokred
from tests.one_capture import Ways
from tests.passes.sparse_models import example, gates, linears, made, masking, masking_blocks, mlps
from tests.small_block import batch, measured, small
from tokred.compiler.cost import Skipped, predict_neurons
from tokred.compiler.machine import Machine
from tokred.compiler.relaid import Relaid
from tokred.registry.recipe import parse_recipe

pytestmark = pytest.mark.slow


class LoraLinear(nn.Module):
    """As PEFT writes it."""

    def __init__(self, base: nn.Linear, rank: int = 4):
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.lora_B.weight, std=0.3)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x)) * 2.0


def generated(model, ids, tokens=10):
    with torch.no_grad():
        done = model.generate(
            ids, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return done.sequences, torch.stack(done.logits, 1)


def limits_of(calibration, values, sparsity):
    sites = [site for site in calibration.sites if site.values == values]
    return {name: site.sketch.threshold(sparsity) for site in sites for name in site.parameters}


def only_decoding(limits):
    """A mask that leaves prompts alone."""
    return lambda name, x: x if x.shape[-2] > 1 else torch.where(x.abs() > limits[name], x, 0.0)


def sparse(model, recipe, **options):
    tokred.reset()
    torch.compiler.reset()
    return tokred.compile(model, recipe, fullgraph=True, strict=True, lower="eager", **options)


def same(got, wanted):
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-5 * float(wanted[1].abs().max()))


CATS, TEAL, MOEFY = "cats(sparsity=0.5)", "teal(sparsity=0.4)", "moefy(neurons=8)"
GREEDY = "teal(sparsity=0.4, allocation='greedy')"
RECIPES = {
    ("llama", 1): [CATS, TEAL, GREEDY, MOEFY],
    ("llama", 2): [CATS],
    ("phi3", 1): [CATS],
    ("phi3", 2): [MOEFY],
    ("gpt2", 1): [TEAL, MOEFY],
}


def decoding(model, ids, recipes):
    """The model compiled with each recipe, and what was measured on `ids` for those that ask for that."""
    tokred.reset()
    torch.compiler.reset()
    asks = " + ".join(recipe for recipe in recipes if recipe != MOEFY)
    calibration = tokred.calibrate(model, [ids], recipe=asks, progress=False) if asks else None
    ways = Ways(recipes, calibration=calibration, strict=True)
    return ways, ways.generating(model), calibration


@contextmanager
def defined(model, recipe, calibration):
    """Inside, the unmodified model decodes as the recipe is defined."""
    if recipe == MOEFY:
        context = masking_blocks(model, parse_recipe(recipe).methods[0], decoding=True)
    elif recipe == CATS:
        context = masking(gates(model), only_decoding(limits_of(calibration, "gate", 0.5)), inputs=False)
    else:
        limits = limits_of(calibration, "input", 0.4)
        if recipe == GREEDY:
            uniform, limits = limits, {}
            for site in (site for site in calibration.sites if site.values == "input"):
                share = site.shares[40]
                limits |= dict.fromkeys(site.parameters, site.sketch.threshold(share) if share else -1.0)
            assert limits != uniform
        context = masking(linears(model), only_decoding(limits), inputs=True)
    with context:
        yield


def check_reports(name, model, recipe, graphs):
    """Of the prompt, of the first token, and of tokens behind a cache of run-time length."""
    _, decoding, _ = graphs
    rows = [block for block in decoding.blocks if block.kind == "mlp"]
    assert all(row.method and not row.refusal for row in rows)
    if recipe == CATS:
        assert all(row.flops[1] < 0.75 * row.flops[0] for row in rows)
    elif recipe == MOEFY:
        assert all(row.flops[1] < 0.85 * row.flops[0] for row in rows)
        blocks = len(mlps(model)[0][2][0]) // 8
        assert all(f"{blocks // 2} of {blocks} blocks" in row.note for row in rows)
        assert any("weights are held beside those that they are made of" in note for note in decoding.notes)
    elif name == "gpt2":
        assert decoding.notes == []  # GPT-2's weights are neuron by neuron as they are
    else:
        (note,) = decoding.notes
        assert note.startswith("14 weights are kept a second time")


@pytest.mark.parametrize("name, rows", RECIPES)
def test_decoding_is_as_defined_compiles_no_token_anew_and_sees_new_weights(name, rows, subtests):
    model, ids = made(name, torch.float32), example(name)[:rows]
    recipes = RECIPES[name, rows]
    ways, compiled, calibration = decoding(model, ids, recipes)
    for weights in ("own", "other"):
        if weights == "other":
            turned = {key: x.flip(0) * 1.1 if "norm" not in key else x for key, x in model.state_dict().items()}
            model.load_state_dict(turned)
        dense = generated(model, ids)
        for ways.way in recipes:
            with subtests.test(f"{ways.way}, {weights} weights"):
                with defined(model, ways.way, calibration):
                    wanted = generated(model, ids)
                assert not torch.allclose(wanted[1], dense[1], atol=1e-3)
                same(generated(compiled, ids), wanted)
                check_reports(name, model, ways.way, ways.reports[ways.way])
    assert Relaid.total() > 0


ADAPTED = ("down_proj", "up_proj", "gate_proj")


def test_lora_branches_beside_the_linears_of_an_mlp():
    """In each layer beside another. Blocks are those of the weights that the branches stand beside."""
    model, ids = made("llama", torch.float32, layers=3), example("llama")[:1]
    for layer, adapted in zip(model.model.layers, ADAPTED, strict=True):
        setattr(layer.mlp, adapted, LoraLinear(getattr(layer.mlp, adapted)))
    ways, compiled, calibration = decoding(model, ids, [CATS, MOEFY])
    limits = limits_of(calibration, "gate", 0.5)
    acts = [layer.mlp.act_fn for layer in model.model.layers]
    assert len(limits) == len(acts)
    names = [f"model.layers.{i}.mlp.gate_proj.{'base.' if i == 2 else ''}weight" for i in range(3)]
    with masking(dict(zip(names, acts, strict=True)), only_decoding(limits), inputs=False):
        wanted = generated(model, ids, tokens=2)
    same(generated(compiled, ids, tokens=2), wanted)
    rows = [block for block in ways.reports[CATS][1].blocks if block.kind == "mlp"]
    assert [row.form for row in rows] == ["gated"] * 3
    assert all(row.method and not row.refusal for row in rows)
    ways.way = MOEFY
    with defined(model, MOEFY, None):
        wanted = generated(model, ids, tokens=2)
    same(generated(compiled, ids, tokens=2), wanted)


def test_weights_that_want_gradients_are_masked_instead():
    model, ids = made("llama", torch.float32, layers=1), example("llama")[:1]
    compiled = sparse(model, "cats(threshold=0.2)")
    with torch.no_grad():
        cache = compiled(ids, use_cache=True).past_key_values
    out = compiled(ids[:, :1], past_key_values=cache, use_cache=True)
    out.logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    notes = [block.note for block in tokred.reports().graphs[-1].blocks if block.kind == "mlp"]
    assert all("by masking: the weight's gradient is wanted" in note for note in notes)


def test_under_autocast_all_is_computed_and_masked():
    model, ids = made("llama", torch.float32, layers=1), example("llama")[:1]
    mask = only_decoding(dict.fromkeys(gates(model), 0.2))
    compiled = sparse(model, "cats(threshold=0.2)")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with masking(gates(model), mask, inputs=False):
            wanted = generated(model, ids, tokens=2)
        same(generated(compiled, ids, tokens=2), wanted)
    notes = [block.note for block in tokred.reports().graphs[-1].blocks if block.kind == "mlp"]
    assert all("by masking: under autocast" in note for note in notes)


def test_the_gate_refuses_what_does_not_pay():
    """Weights this small are read faster than two operators start; of ten rows few weights stay unread."""
    model, ids = made("llama", torch.float32, layers=1), example("llama")[:1]
    calibration = tokred.calibrate(model, [ids], recipe="cats", progress=False)
    tokred.reset()
    torch.compiler.reset()
    compiled = tokred.compile(model, "cats()", lower="eager", gate=True, calibration=calibration)
    got, wanted = generated(compiled, ids, tokens=2), generated(model, ids, tokens=2)
    same(got, wanted)
    rows = [block for block in tokred.reports().graphs[1].blocks if block.kind == "mlp"]
    assert [row.refusal.code for row in rows] == ["does-not-pay"]
    values = torch.empty(1, 1, 8192, device="meta")
    machine = Machine("test", {torch.float32: 1e11}, 1e10, 1e-5)
    one = predict_neurons([Skipped(values, 2 * 2048 * 8192, 2, 0.5)], machine)
    four = predict_neurons([Skipped(values.expand(4, -1, -1), 2 * 2048 * 8192, 2, 0.5)], machine)
    assert one.pays and 6.5e-3 < one.saves < 7.5e-3  # half of 134 MB at 10 GB/s, and 34 MFLOPs
    assert four.saves < 0.35 * one.saves


@pytest.mark.slow
@torch.no_grad()
def test_through_inductor():
    model, x = small(), batch(0)[:1, :1]
    names = {recipe: (f"{recipe} eager", f"{recipe} inductor") for recipe in (CATS, TEAL, MOEFY)}
    lowered = {name: {"recipe": recipe, "lower": name.split()[-1]} for recipe, both in names.items() for name in both}
    torch.compiler.reset()
    ways = Ways(lowered, calibration=measured(model), strict=True)
    compiled, found = ways.compile(model), {}
    for way in ways:
        found[way] = compiled(x)
        assert all(row.method and not row.refusal for row in ways.report.blocks if row.kind == "mlp")
    for wanted, got in ((found[eager], found[inductor]) for eager, inductor in names.values()):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
