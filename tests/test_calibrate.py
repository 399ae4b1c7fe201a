"""tokred.calibrate: what it measures, where it is kept, and what it says of a calibration that does not fit."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

import tokred
from tests.passes.sparse_models import example, made
from tests.small_block import GREEDY, batch, measured, small
from tokred.compiler.calibration import Fingerprint
from tokred.errors import CalibrationError, OptionError
from tokred.registry.sketch import BINS, Sketch


def apply(model, calibration, recipe="cats(phase='masked')"):
    torch.compiler.reset()
    options = {"recipe": recipe, "lower": "eager", "calibration": calibration}
    with torch.no_grad():
        return torch.compile(model, backend="tokred", options=options)(batch(0))


def test_a_sketch_counts_and_merges_exactly():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 3
    whole, first, second = Sketch(), Sketch(), Sketch()
    whole.add(values)
    first.add(values[:1234])
    second.add(values[1234:].reshape(2, -1))
    first.merge(second)
    assert np.array_equal(whole.counts, first.counts)
    for share in (0.1, 0.5, 0.9, 0.99):
        threshold, exact = whole.threshold(share), values.abs().quantile(share)
        assert 0 <= threshold - exact <= 0.009 * exact
        assert (values.abs() <= threshold).double().mean() >= share
        assert abs(whole.share(threshold) - share) < 0.01
        assert float(torch.tensor(threshold).bfloat16()) == threshold


def test_a_sketch_of_many_zeros_has_threshold_zero():
    sketch = Sketch()
    sketch.add(torch.tensor([0.0, 0.0, 0.0, -1.0]))
    assert sketch.threshold(0.7) == 0.0
    assert 1.0 < sketch.threshold(0.8) <= 1.01
    assert sketch.share(0.0) == 0.75
    with pytest.raises(ValueError, match="nothing was counted"):
        Sketch().threshold(0.5)


def test_types_of_lower_precision_are_counted_as_they_are():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    one, other = Sketch(), Sketch()
    one.add(values)
    other.add(values.double())
    assert np.array_equal(one.counts, other.counts) and one.total == 1000 and len(one.counts) == BINS


def test_sites_are_kept_by_parameter_name():
    found = measured()
    sites = {(site.values, site.parameters) for site in found.sites}
    assert sites == {
        ("gate", ("gate.weight",)),
        ("input", ("gate.weight", "up.weight")),
        ("input", ("down.weight",)),
        ("input", ("q.weight", "k.weight", "v.weight")),
        ("input", ("out.weight",)),
    }
    assert found.model == "Small" and len(found.parameters) == 7
    assert {site.values for site in measured(recipe="cats").sites} == {"gate"}
    totals = {site.parameters: site.sketch.total for site in found.sites if site.values == "input"}
    assert totals["down.weight",] == 2 * 3 * 7 * 16


@pytest.mark.parametrize("name", ["small.json", "small.safetensors"])
def test_saved_and_loaded_it_is_the_same(tmp_path, name):
    found = measured()
    path = found.save(tmp_path / name)
    assert tokred.Calibration.load(path).to_json() == found.to_json()
    assert torch.equal(apply(small(), str(path)), apply(small(), found))
    assert not torch.equal(apply(small(), str(path)), small()(batch(0)))


def test_padding_does_not_count():
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :4] = 0
    model, x = small(), batch(0)
    padded = tokred.calibrate(model, [{"x": x, "attention_mask": mask}], recipe="teal", progress=False)
    sketch = next(site.sketch for site in padded.sites if site.parameters == ("q.weight", "k.weight", "v.weight"))
    wanted = Sketch()
    wanted.add(x[mask.bool()])
    assert np.array_equal(sketch.counts, wanted.counts)


@pytest.mark.slow
def test_padding_of_flattened_rows_does_not_count():
    """GPT-2 multiplies [B*N C]."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :5] = 0
    inputs = {"input_ids": example("gpt2"), "attention_mask": mask}
    found = tokred.calibrate(made("gpt2"), [inputs], recipe="teal", progress=False)
    totals = {site.parameters[0].split(".", 3)[3]: site.sketch.total for site in found.sites}
    assert totals == {"mlp.c_fc.weight": 13 * 32, "mlp.c_proj.weight": 13 * 128, "attn.c_attn.weight": 13 * 32} | {
        "attn.c_proj.weight": 13 * 32
    }
    with pytest.raises(CalibrationError, match="counted nothing in 'input' at"):
        tokred.calibrate(made("gpt2"), [inputs | {"attention_mask": mask * 0}], recipe="teal", progress=False)


@pytest.mark.slow
def test_another_model_is_an_error_that_says_what_differs():
    found = measured()
    with pytest.raises(
        Exception, match=r"CalibrationError: .*another model: 'gate.weight' has other values than when Small"
    ):
        apply(small(seed=1), found)
    with pytest.raises(
        Exception, match=r"CalibrationError: .*'gate.weight' is \[24, 8\] in the model and was \[16, 8\]"
    ):
        apply(small(neurons=24), found)
    options = {"recipe": "cats(phase='masked')", "calibration": found}
    llama, ids = torch.compile(made("llama", layers=1), backend="tokred", options=options), example("llama")
    with pytest.raises(Exception, match=r"CalibrationError: .*no parameter 'model.layers.0.mlp.gate_proj.weight'"):
        llama(ids)


def test_a_site_that_was_not_measured_is_an_error():
    with pytest.raises(Exception, match=r"CalibrationError: .*measured gate, not 'input' at 'gate.weight'"):
        apply(small(), measured(recipe="cats"), "teal(phase='masked')")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_was_cast_is_the_same(dtype):
    torch.compiler.reset()
    options = {"recipe": "cats(phase='masked')", "lower": "eager", "calibration": measured(), "strict": True}
    torch.compile(small().to(dtype), backend="tokred", options=options)(batch(0).to(dtype))
    one, other = Fingerprint.of(small().gate.weight), Fingerprint.of(small(seed=1).gate.weight)
    assert one.fits(Fingerprint.of(small().to(dtype).gate.weight)) and not one.fits(other)


def test_a_compiled_model_is_calibrated_under_the_plain_one_s_names():
    assert measured(torch.compile(small(), backend="eager")).to_json() == measured().to_json()


def test_damaged_files_are_errors(tmp_path):
    path = measured().save(tmp_path / "small.json")
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(CalibrationError, match=r"small.json' is truncated or no JSON"):
        tokred.compile(small(), "cats", calibration=path)
    path.write_text('{"recipe": "tome"}')
    with pytest.raises(CalibrationError, match="is none"):
        tokred.Calibration.load(path)
    data = json.loads(text)
    path.write_text(json.dumps(data | {"version": 99}))
    with pytest.raises(CalibrationError, match="version 99"):
        tokred.Calibration.load(path)
    site = data["sites"][0]
    wrong = [
        {"counts": site["counts"][1:]},
        {"counts": [10**30, *site["counts"][1:]]},
        {"bins": site["bins"][:1] * len(site["bins"])},
    ]
    wrong += [{"counts": [value, *site["counts"][1:]]} for value in (-1, 1.5, None, "1")]
    for change in [*wrong, {"bins": [BINS, *site["bins"][1:]]}, {"parameters": None}]:
        path.write_text(json.dumps(data | {"sites": [site | change]}))
        with pytest.raises(CalibrationError, match=r"damaged: (ValueError: bins (and|or) counts|TypeError)"):
            tokred.Calibration.load(path)
    with pytest.raises(CalibrationError, match="No such file"):
        tokred.Calibration.load(tmp_path / "absent.json")
    with pytest.raises(OptionError, match="calibration=3"):
        tokred.compile(small(), "cats", calibration=3)


def test_damaged_tensor_files_are_errors(tmp_path):
    found = measured(recipe=GREEDY)
    path = found.save(tmp_path / "small.safetensors")
    whole, tensors = path.read_bytes(), load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert tensors["0.counts"].sum() == found.sites[0].sketch.total and tensors["0.shares"][0] == 0
    for length in (len(whole) // 2, 5):
        path.write_bytes(whole[:length])
        with pytest.raises(CalibrationError, match=r"small.safetensors' is truncated or no safetensors"):
            tokred.compile(small(), "cats", calibration=path)
    save_file(tensors, path, {"format": "np"})
    with pytest.raises(CalibrationError, match="is none"):
        tokred.Calibration.load(path)
    half = {**tensors, "0.counts": tensors["0.counts"][1:]}
    lost = {name: values for name, values in tensors.items() if name != "1.bins"}
    none = {**tensors, "0.counts": np.full(tensors["0.counts"].shape, np.nan)}
    shares = {**tensors, "0.shares": np.full(3, np.nan)}
    for damaged, message in (
        (half, "ValueError: bins and counts do not fit"),
        (lost, "KeyError: 'bins'"),
        (none, "ValueError: bins and counts do not fit"),
        (shares, "ValueError: shares left out lie in"),
    ):
        save_file(damaged, path, metadata)
        with pytest.raises(CalibrationError, match=f"damaged: {message}"):
            tokred.Calibration.load(path)
    with pytest.raises(CalibrationError, match="No such file"):
        tokred.Calibration.load(tmp_path / "absent.safetensors")
    other = measured(small(seed=1)).save(path)
    with pytest.raises(Exception, match=r"CalibrationError: .*another model: 'gate.weight' has other values"):
        apply(small(), other)


@pytest.mark.parametrize("name", ["small.json", "small.safetensors"])
def test_numbers_that_are_none_are_errors(tmp_path, name):
    poisoned = batch(0)
    poisoned[0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"infinite numbers, or NaN, in '(gate|input)' at"):
        tokred.calibrate(small(), [poisoned], progress=False)
    found = measured()
    found.sites[0].sketch.add(torch.tensor([torch.inf]))
    path = found.save(tmp_path / name)
    with pytest.raises(CalibrationError, match="infinite numbers"):
        tokred.Calibration.load(path)


def test_what_cannot_be_measured_is_an_error():
    with pytest.raises(CalibrationError, match="training mode"):
        tokred.calibrate(small().train(), [batch(0)], progress=False)
    with pytest.raises(CalibrationError, match="no method of the recipe"):
        tokred.calibrate(small(), [batch(0)], recipe="random_neurons", progress=False)
    with pytest.raises(CalibrationError, match="Sequential has no linear layers of MLPs"):
        tokred.calibrate(nn.Sequential(nn.Linear(8, 8)).eval(), [batch(0)], progress=False)


def test_merging_adds_up_and_refuses_another_models():
    both, first, second = measured(), measured(seeds=(0,)), measured(seeds=(1,))
    first.merge(second)
    assert first.to_json() == both.to_json()
    with pytest.raises(CalibrationError, match=r"different models: .*differ in 7 parameters, 'gate.weight' the first"):
        first.merge(measured(small(seed=1)))
    some = tokred.calibrate(small(), [batch(0)], recipe="teal", progress=False)
    for one, other in ((both, some), (some, both)):
        before = one.to_json()
        with pytest.raises(CalibrationError, match=r"only one of two calibrations measured 'gate' at 'gate.weight'"):
            one.merge(other)
        assert one.to_json() == before


def _one_of_two(rank, address, folder):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    found = measured(seeds=(rank,))
    found.all_merge()
    found.save(f"{folder}/{rank}.json")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    mp.spawn(_one_of_two, (f"file://{tmp_path}/meeting", str(tmp_path)), nprocs=2)
    one = measured(seeds=(0, 1)).to_json()
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [one] * 2
