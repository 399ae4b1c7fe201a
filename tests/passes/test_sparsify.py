"""Sparse methods against their definitions, which hooks that mask compute on the unmodified model."""

from contextlib import suppress

import pytest
import torch
import transformers as hf

import tokred
from tests.one_capture import Ways
from tests.passes.sparse_models import GATED, MODELS, TWO, example, gates, linears, made, masking, masking_blocks
from tokred.calibrate import calibrate
from tokred.registry.recipe import parse_recipe

MEASURED = 1e-9  # relative to the outputs, in float64
GREEDY = "teal(sparsity=0.4, allocation='greedy', phase='masked')"
ALLOCATED = ("llama", "phi3", "gpt2")  # whose layers get shares of their own


pytestmark = pytest.mark.slow


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


class Case:
    """A model in float64, two batches, and what was measured of them."""

    def __init__(self, name):
        self.name, self.model = name, made(name)
        self.batches = [example(name, seed) for seed in range(2)]
        self.inputs = self.batches[0]
        self.dense = run(self.model, self.inputs)
        recipe = " + ".join([GREEDY if name in ALLOCATED else "teal", *["cats"] * (name in GATED)])
        self.calibration = calibrate(self.model, self.batches, recipe=recipe, progress=False)

    def agree(self, got, modules, mask, *, reads):
        with masking(modules, mask, inputs=reads):
            wanted = run(self.model, self.inputs)
        self.equal(got, wanted)

    def equal(self, got, wanted):
        assert (wanted - self.dense).abs().max() > 1e-3 * self.dense.abs().max()
        torch.testing.assert_close(got, wanted, rtol=MEASURED, atol=MEASURED * float(self.dense.abs().max()))


# Each of these gives the options that it is about, and goes on with what the model computes under them and the report.


def masks_below_quantiles(case, method, sparsity, modules, *, reads):
    calibration, recipe = case.calibration, f"{method}(sparsity={sparsity}, phase='masked')"
    got, _ = yield {"recipe": recipe, "calibration": calibration, "strict": True}
    values = collected(case.model, modules, case.batches, inputs=reads)
    limits = thresholds(calibration, "input" if reads else "gate", values, sparsity)
    case.agree(got, modules, lambda name, x: torch.where(x.abs() > limits[name], x, 0.0), reads=reads)


def teal_masks_what_every_linear_reads(case):
    yield from masks_below_quantiles(case, "teal", 0.4, linears(case.model), reads=True)


def cats_masks_the_activated_gate(case):
    yield from masks_below_quantiles(case, "cats", 0.6, gates(case.model), reads=False)


def greedy_shares_of_every_layer_leave_out_what_was_asked_for(case):
    calibration = case.calibration
    got, _ = yield {"recipe": GREEDY, "calibration": calibration, "strict": True}
    modules = linears(case.model)
    limits, left = {}, {}
    for site in (site for site in calibration.sites if site.values == "input"):
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
    case.agree(got, modules, lambda name, x: torch.where(x.abs() > limits[name], x, 0.0), reads=True)


def teal_without_its_allocation_is_refused(case):
    calibration = calibrate(case.model, case.batches[:1], recipe="teal", progress=False)
    _, report = yield {"recipe": "teal(allocation='greedy', phase='masked')", "calibration": calibration}
    refusals = [block.refusal for block in report.blocks]
    assert {refusal.code for refusal in refusals} == {"no-allocation"}
    assert "tokred.calibrate(model, batches, recipe=\"teal(allocation='greedy')\")" in refusals[0].reason


def an_allocation_that_ends_early_is_refused_behind_its_end(case):
    too_much = "teal(sparsity=0.999, allocation='greedy', phase='masked')"
    _, report = yield {"recipe": too_much, "calibration": case.calibration}
    refusals = [block.refusal for block in report.blocks]
    assert {refusal.code for refusal in refusals} == {"no-allocation"} and "ends where 9" in refusals[0].reason


def cats_refuses_mlps_without_a_gate(case):
    _, report = yield {"recipe": "cats(threshold=0.1, phase='masked')"}
    assert [block.refusal.code for block in report.blocks if block.refusal] == ["not-gated"] * 2


def moefy_masks_blocks_of_neurons(case):
    recipe = "moefy(sparsity=0.6, neurons=7, phase='masked')"
    got, _ = yield {"recipe": recipe, "strict": True}
    with masking_blocks(case.model, parse_recipe(recipe).methods[0]):
        case.equal(got, run(case.model, case.inputs))


def random_neurons_leave_out_the_same_neurons_of_every_token(case):
    got, _ = yield {"recipe": "random_neurons(sparsity=0.25, phase='masked')", "strict": True}
    seen = {}
    down = {key: module for key, module in linears(case.model).items() if "down_proj" in key or "mlp.c_proj" in key}

    def draw(key, x):
        layer = list(down).index(key)
        ranks = tokred.methods()["random_neurons"](sparsity=0.25).masked(torch.ones(x.shape[-1]), place(layer))
        seen[key] = ranks
        return x * ranks

    case.agree(got, down, draw, reads=True)
    assert all(kept.sum() == 0.75 * len(kept) for kept in seen.values())
    first, second = seen.values()
    assert not torch.equal(first, second)


class Failing(tokred.Sparsity):
    name = "failing"
    acts_at = ("up", "down")

    def idle(self, place):
        return False

    def masked(self, values, place):
        if (place.layer, place.role) == (0, "down"):
            raise RuntimeError("no")
        return values * 0.5


def a_method_that_raises_at_one_place_is_refused_at_the_whole_block(case):
    """What it does at the others is not left behind."""
    got, report = yield {"recipe": Failing(phase="masked")}
    first, second = (block for block in report.blocks if block.kind == "mlp")
    assert (first.refusal.code, second.refusal) == ("method-raised", None)
    halved = {name: m for name, m in linears(case.model).items() if "layers.1.mlp" in name}
    case.agree(got, halved, lambda name, x: x * 0.5, reads=True)


def no_inputs_left_out_is_the_unmodified_model(case):
    got, _ = yield {"recipe": "teal(sparsity=0, phase='masked')", "exact": False}
    assert torch.equal(got, case.dense)


def no_gates_left_out_is_the_unmodified_model(case):
    got, _ = yield {"recipe": "cats(sparsity=0, phase='masked')", "exact": False}
    assert torch.equal(got, case.dense)


def no_blocks_left_out_is_the_unmodified_model(case):
    got, _ = yield {"recipe": "moefy(sparsity=0, phase='masked')", "exact": False}
    assert torch.equal(got, case.dense)


def prompts_stay_dense_while_the_method_means_the_decoding(case):
    got, report = yield {"recipe": "cats(threshold=0.1)", "exact": False, "strict": True}
    assert torch.equal(got, case.dense)
    assert [block.refusal.code for block in report.blocks if block.kind == "mlp"] == ["prefill"] * 2


def a_model_that_never_decodes_says_so(case):
    _, report = yield {"recipe": "teal(threshold=0.1)"}
    assert {block.refusal.code for block in report.blocks} == {"no-decode"}


def a_method_without_its_calibration_is_refused(case):
    _, report = yield {"recipe": "teal(phase='masked')"}
    refusals = [block.refusal for block in report.blocks]
    assert {refusal.code for refusal in refusals} == {"no-calibration"}
    assert "tokred.calibrate(model, batches, recipe='teal')" in refusals[0].reason


STATEMENTS = {
    teal_masks_what_every_linear_reads: tuple(MODELS),
    cats_masks_the_activated_gate: GATED,
    greedy_shares_of_every_layer_leave_out_what_was_asked_for: ALLOCATED,
    teal_without_its_allocation_is_refused: ("llama",),
    an_allocation_that_ends_early_is_refused_behind_its_end: ("llama",),
    cats_refuses_mlps_without_a_gate: ("gpt2", "opt", "vit"),
    moefy_masks_blocks_of_neurons: tuple(MODELS),
    random_neurons_leave_out_the_same_neurons_of_every_token: ("llama", "gpt2"),
    a_method_that_raises_at_one_place_is_refused_at_the_whole_block: ("llama",),
    no_inputs_left_out_is_the_unmodified_model: ("llama",),
    no_gates_left_out_is_the_unmodified_model: ("llama",),
    no_blocks_left_out_is_the_unmodified_model: ("llama",),
    prompts_stay_dense_while_the_method_means_the_decoding: ("llama",),
    a_model_that_never_decodes_says_so: ("vit",),
    a_method_without_its_calibration_is_refused: ("llama",),
}


@pytest.mark.parametrize("name", MODELS)
def test_methods_are_what_they_are_defined_as(name, subtests):
    torch.compiler.reset()
    case = Case(name)
    begun = {each.__name__: each(case) for each, names in STATEMENTS.items() if name in names}
    ways = Ways({statement: next(rest) for statement, rest in begun.items()})
    fast = ways.compile(case.model)
    for ways.way, rest in begun.items():
        with subtests.test(ways.way), suppress(StopIteration):
            rest.send((run(fast, case.inputs), ways.report))


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


def test_routed_experts_are_named_and_refused():
    sizes = TWO | {"num_hidden_layers": 1, "num_local_experts": 4}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes)).eval()
    run(compiled(model, "cats(threshold=0.1, phase='masked', layers=[-1])"), example("llama"))
    (row,) = [block for block in tokred.reports().graphs[0].blocks if block.kind == "mlp"]
    assert (row.form, row.refusal.code) == ("routed", "experts")
    assert row.module == "model.layers.0.mlp.experts"
