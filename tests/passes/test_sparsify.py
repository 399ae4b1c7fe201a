"""Sparse methods against their definitions, which hooks that mask compute on the unmodified model."""

from itertools import product

import pytest
import torch
import transformers as hf

import tokred
from tests.passes.sparse_models import GATED, MODELS, TWO, example, gates, linears, made, masking, masking_blocks
from tokred.calibrate import calibrate
from tokred.registry.recipe import parse_recipe

MEASURED = 1e-9  # relative to the outputs, in float64


def run(model, inputs):
    with torch.no_grad():
        out = model(inputs)
    return out.logits if "logits" in out else out.last_hidden_state


def compiled(model, recipe, **options):
    torch.compiler.reset()
    tokred.reset()
    return torch.compile(
        model, backend="tokred", fullgraph=True, options={"recipe": recipe, "lower": "eager", **options}
    )


def collected(model, modules, batches, *, inputs):
    """All numbers that the modules read, or give, by name."""
    values = {}

    def keep(name, x):
        values.setdefault(name, []).append(x.flatten())
        return x

    with masking(modules, keep, inputs=inputs):
        for batch in batches:
            run(model, batch)
    return {name: torch.cat(parts).abs() for name, parts in values.items()}


def thresholds(calibration, measured, values, sparsity):
    """The calibration's, checked to be the quantiles to a bin."""
    found = {}
    for site in calibration.sites:
        if site.values == measured:
            threshold = site.sketch.threshold(sparsity)
            for name in site.parameters:
                exact = values[name].sort().values[int(sparsity * len(values[name]))]
                assert abs(threshold - exact) <= 0.01 * exact + 1e-12
                assert (values[name] <= threshold).double().mean() >= sparsity
                found[name] = threshold
    assert sorted(found) == sorted(values)
    return found


def check(model, recipe, calibration, modules, limits, inputs, *, reads):
    with masking(modules, lambda name, x: torch.where(x.abs() > limits[name], x, 0.0), inputs=reads):
        wanted = run(model, inputs)
    dense = run(model, inputs)
    got = run(compiled(model, recipe, calibration=calibration, strict=True), inputs)
    assert (wanted - dense).abs().max() > 1e-3 * dense.abs().max()
    torch.testing.assert_close(got, wanted, rtol=MEASURED, atol=MEASURED * float(dense.abs().max()))


KINDS = {"teal": ("input", linears, 0.4), "cats": ("gate", gates, 0.6)}


@pytest.mark.parametrize("method, name", [*product(["teal"], MODELS), *product(["cats"], GATED)])
def test_a_method_masks_what_every_linear_reads_or_the_activated_gate(method, name):
    measured, found, sparsity = KINDS[method]
    model, batches = made(name), [example(name, seed) for seed in range(2)]
    calibration = calibrate(model, batches, recipe=method, progress=False)
    modules, reads = found(model), measured == "input"
    values = collected(model, modules, batches, inputs=reads)
    limits = thresholds(calibration, measured, values, sparsity)
    recipe = f"{method}(sparsity={sparsity}, phase='masked')"
    check(model, recipe, calibration, modules, limits, batches[0], reads=reads)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_greedy_shares_of_every_layer_leave_out_what_was_asked_for(name):
    model, batches = made(name), [example(name, seed) for seed in range(2)]
    greedy = "teal(sparsity=0.4, allocation='greedy', phase='masked')"
    calibration = calibrate(model, batches, recipe=greedy, progress=False)
    modules = linears(model)
    limits, left = {}, {}
    for site in calibration.sites:
        share = site.shares[40]
        for parameter in site.parameters:
            limits[parameter] = site.sketch.threshold(share) if share else -1.0
            left[parameter] = share
    sizes = {parameter: modules[parameter].weight.numel() for parameter in limits}
    for layer in ("0", "1"):
        own = [parameter for parameter in limits if layer in parameter.split(".")]
        part = sum(left[parameter] * sizes[parameter] for parameter in own) / sum(map(sizes.get, own))
        assert part == pytest.approx(0.4)
    assert len(set(left.values())) > 4
    check(model, greedy, calibration, modules, limits, batches[0], reads=True)


def test_teal_without_its_allocation_is_refused():
    model, batches = made("llama"), [example("llama")]
    calibration = calibrate(model, batches, recipe="teal", progress=False)
    run(compiled(model, "teal(allocation='greedy', phase='masked')", calibration=calibration), batches[0])
    refusals = [block.refusal for block in tokred.reports().graphs[0].blocks]
    assert {refusal.code for refusal in refusals} == {"no-allocation"}
    assert "tokred.calibrate(model, batches, recipe=\"teal(allocation='greedy')\")" in refusals[0].reason
    too_much = "teal(sparsity=0.999, allocation='greedy', phase='masked')"
    calibration = calibrate(model, batches, recipe=too_much, progress=False)
    run(compiled(model, too_much, calibration=calibration), batches[0])
    refusals = [block.refusal for block in tokred.reports().graphs[0].blocks]
    assert {refusal.code for refusal in refusals} == {"no-allocation"} and "ends where 9" in refusals[0].reason


@pytest.mark.parametrize("name", ["gpt2", "opt", "vit"])
def test_cats_refuses_mlps_without_a_gate(name):
    model = made(name)
    run(compiled(model, "cats(threshold=0.1, phase='masked')"), example(name))
    refused = [block.refusal.code for block in tokred.reports().graphs[0].blocks if block.refusal]
    assert refused == ["not-gated"] * 2


@pytest.mark.parametrize("name", MODELS)
def test_moefy_masks_blocks_of_neurons(name):
    model, inputs = made(name), example(name)
    recipe = "moefy(sparsity=0.6, neurons=7, phase='masked')"
    with masking_blocks(model, parse_recipe(recipe).methods[0]):
        wanted = run(model, inputs)
    dense = run(model, inputs)
    got = run(compiled(model, recipe, strict=True), inputs)
    assert (wanted - dense).abs().max() > 1e-3 * dense.abs().max()
    torch.testing.assert_close(got, wanted, rtol=MEASURED, atol=MEASURED * float(dense.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_random_neurons_leave_out_the_same_neurons_of_every_token(name):
    model, inputs = made(name), example(name)
    seen = {}
    down = {key: module for key, module in linears(model).items() if "down_proj" in key or "mlp.c_proj" in key}

    def draw(key, x):
        layer = list(down).index(key)
        ranks = tokred.methods()["random_neurons"](sparsity=0.25).masked(torch.ones(x.shape[-1]), place(layer))
        seen[key] = ranks
        return x * ranks

    with masking(down, draw, inputs=True):
        wanted = run(model, inputs)
    got = run(compiled(model, "random_neurons(sparsity=0.25, phase='masked')", strict=True), inputs)
    torch.testing.assert_close(got, wanted, rtol=MEASURED, atol=MEASURED)
    assert all(kept.sum() == 0.75 * len(kept) for kept in seen.values())
    first, second = seen.values()
    assert not torch.equal(first, second)


def test_random_neurons_depend_on_seed_and_layer_alone():
    method, values = tokred.methods()["random_neurons"], torch.ones(2, 3, 40)
    for share, left in ((0.25, 30), (0.5, 20), (0.9, 4)):
        assert (method(sparsity=share).masked(values, place(0)).sum(-1) == left).all()
    masks = [method(seed=seed).masked(values, place(layer)) for seed in (0, 1) for layer in (0, 1)]
    assert all(torch.equal(mask, mask[:1, :1].expand_as(mask)) for mask in masks)
    assert len({tuple(mask[0, 0].tolist()) for mask in masks}) == 4
    assert torch.equal(masks[0], method(seed=0).masked(values, place(0)))


def place(layer):
    return tokred.Neurons(layer, 2, "", "down", 0)


def test_a_method_that_raises_at_one_place_is_refused_at_the_whole_block():
    """What it does at the others is not left behind."""
    model, inputs = made("llama"), example("llama")

    class Failing(tokred.Sparsity):
        name = "failing"
        acts_at = ("up", "down")

        def idle(self, place):
            return False

        def masked(self, values, place):
            if (place.layer, place.role) == (0, "down"):
                raise RuntimeError("no")
            return values * 0.5

    got = run(compiled(model, Failing(phase="masked")), inputs)
    first, second = (block for block in tokred.reports().graphs[0].blocks if block.kind == "mlp")
    assert (first.refusal.code, second.refusal) == ("method-raised", None)
    halved = {name: m for name, m in linears(model).items() if "layers.1.mlp" in name}
    with masking(halved, lambda name, x: x * 0.5, inputs=True):
        wanted = run(model, inputs)
    torch.testing.assert_close(got, wanted, rtol=MEASURED, atol=MEASURED * float(wanted.abs().max()))


@pytest.mark.parametrize("recipe", [f"{name}(sparsity=0, phase='masked')" for name in ("teal", "cats", "moefy")])
def test_nothing_left_out_is_the_unmodified_model(recipe):
    model, inputs = made("llama"), example("llama")
    got = run(compiled(model, recipe, exact=False), inputs)
    assert torch.equal(got, run(model, inputs))


def test_prompts_stay_dense_while_the_method_means_the_decoding():
    model, inputs = made("llama"), example("llama")
    got = run(compiled(model, "cats(threshold=0.1)", exact=False, strict=True), inputs)
    assert torch.equal(got, run(model, inputs))
    blocks = tokred.reports().graphs[0].blocks
    assert [block.refusal.code for block in blocks if block.kind == "mlp"] == ["prefill"] * 2


def test_a_model_that_never_decodes_says_so():
    run(compiled(made("vit"), "teal(threshold=0.1)"), example("vit"))
    assert {block.refusal.code for block in tokred.reports().graphs[0].blocks} == {"no-decode"}


def test_a_method_without_its_calibration_is_refused():
    run(compiled(made("llama"), "teal(phase='masked')"), example("llama"))
    refusals = [block.refusal for block in tokred.reports().graphs[0].blocks]
    assert {refusal.code for refusal in refusals} == {"no-calibration"}
    assert "tokred.calibrate(model, batches, recipe='teal')" in refusals[0].reason


def test_routed_experts_are_named_and_refused():
    sizes = TWO | {"num_hidden_layers": 1, "num_local_experts": 4}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes)).eval()
    run(compiled(model, "cats(threshold=0.1, phase='masked', layers=[-1])"), example("llama"))
    (row,) = [block for block in tokred.reports().graphs[0].blocks if block.kind == "mlp"]
    assert (row.form, row.refusal.code) == ("routed", "experts")
    assert row.module == "model.layers.0.mlp.experts"
