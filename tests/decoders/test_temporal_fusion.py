"""TTF-VLA: a sequence of frames through a compiled model, against transformers' own modules called by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import tokred
from tests.decoders import oracle
from tests.decoders.models import IMAGE, LENGTH, PATCHES, SPAN, build, prompts
from tests.decoders.test_mask_oracle import reference, visual
from tests.one_capture import Switch
from tokred.compiler.options import parse_options
from tokred.errors import ArgumentError, StrictError
from tokred.generation import with_pruned_caches
from tokred.registry.merge.temporal_fusion import TemporalFusion
from tokred.registry.recipe import parse_recipe

SIDE, PATCH = 32, 8
FORMS: dict[str, dict[str, Any]] = {
    "hybrid": {"pixel": 0.3, "relevant": 0.2},
    "pixel": {"pixel": 0.3, "relevant": 0},
    "attention": {"pixel": None, "relevant": 0.4},
}


pytestmark = pytest.mark.usefixtures("fresh")


def video(batch: int, frames: int) -> list[Tensor]:
    """Frames of which a third of the patches, others each time, change much and all change a little."""
    generator = torch.Generator().manual_seed(2)
    size = (batch, 3, SIDE, SIDE)
    found = [torch.randn(size, generator=generator, dtype=torch.float64)]
    for _ in range(frames - 1):
        moved = torch.rand(batch, 1, SIDE // PATCH, SIDE // PATCH, generator=generator, dtype=torch.float64) < 0.33
        where = moved.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
        other = torch.randn(size, generator=generator, dtype=torch.float64)
        noise = 0.05 * torch.randn(size, generator=generator, dtype=torch.float64)
        found.append(torch.where(where, other, found[-1] + noise))
    return found


class ByHand:
    """The paper's algorithm around an eager model, one image and one patch after the other."""

    def __init__(self, name: str, *, keyframe: int, pixel: float | None, relevant: float, layer: int) -> None:
        self.model, self.name = reference(name, layers=3), name
        self.keyframe, self.pixel, self.relevant, self.layer = keyframe, pixel, relevant, layer
        self.step, self.pixels, self.features, self.looked = 0, torch.empty(0), torch.empty(0), torch.empty(0)
        self.reused: list[int] = []

    def __call__(self, inputs: dict[str, Tensor], dropped: oracle.Selection | None = None) -> Tensor:
        model, pixels = self.model, inputs["pixel_values"]
        fused: list[Tensor] = []

        def replace(module: Any, args: Any, output: Tensor) -> Tensor:
            fused[:] = fused or [self.fused(pixels, output)]
            return fused[0]

        handle = model.model.multi_modal_projector.register_forward_hook(replace)
        gone = {} if dropped is None else dropped(model, inputs, visual(self.name, inputs))
        weights = oracle.attention_of(model, inputs, self.layer, gone)
        with torch.no_grad(), oracle.masked(gone):
            logits: Tensor = model(**inputs, use_cache=False).logits
        handle.remove()
        image = inputs["input_ids"] == IMAGE
        looked = []
        for sample in range(len(image)):
            rows = image[sample].nonzero().squeeze(-1)
            text = [row for row in range(int(rows.max()) + 1, LENGTH) if inputs["attention_mask"][sample, row]]
            looked.append(torch.stack([weights[sample, :, row][:, rows] for row in text]).mean((0, 1)))
        self.step, self.pixels, self.features, self.looked = self.step + 1, pixels, fused[0], torch.stack(looked)
        return logits

    def fused(self, pixels: Tensor, features: Tensor) -> Tensor:
        features = features.reshape(len(pixels), PATCHES, -1).clone()
        self.reused.append(0)
        if self.step % self.keyframe == 0:
            return features
        for image in range(len(pixels)):
            best = self.looked[image].argsort(descending=True)[: round(self.relevant * PATCHES)].tolist()
            for patch in range(PATCHES):
                y, x = PATCH * (patch // (SIDE // PATCH)), PATCH * (patch % (SIDE // PATCH))
                now, old = (frames[image, :, y : y + PATCH, x : x + PATCH] for frames in (pixels, self.pixels))
                change = (0.299 * (now[0] - old[0]) + 0.587 * (now[1] - old[1]) + 0.114 * (now[2] - old[2])).abs()
                changed = self.pixel is not None and float(change.mean()) > self.pixel
                if not changed and patch not in best:
                    features[image, patch] = self.features[image, patch]
                    self.reused[-1] += 1
        return features


def close(got: Tensor, wanted: Tensor, inputs: dict[str, Tensor]) -> None:
    real = inputs["attention_mask"].bool()
    assert (got[real] - wanted[real]).abs().max() < 1e-9 * wanted[real].abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), [("llava", form) for form in FORMS] + [("llava_qwen3", "hybrid")])
def test_every_frame_is_fused_as_the_paper_says(name: str, form: str) -> None:
    inputs, frames = prompts(3, model=name), video(3, 7)
    by_hand = ByHand(name, keyframe=3, layer=2, **FORMS[form])
    model = tokred.compile(
        build(name, layers=3), TemporalFusion(keyframe=3, layer=2, **FORMS[form]), lower="eager", strict=True
    )
    for pixels in frames:
        given = {**inputs, "pixel_values": pixels}
        with torch.no_grad():
            close(model(**given).logits, by_hand(given), given)
    again = [reused for step, reused in enumerate(by_hand.reused) if step % 3]
    assert [by_hand.reused[step] for step in (0, 3, 6)] == [0, 0, 0]
    assert all(0 < reused < 3 * PATCHES for reused in again), again
    (graph,) = tokred.reports().graphs
    assert "saves no compute" in str(next(p for p in graph.passes if p.name == "fuse_frames").lines)


@pytest.mark.slow
def test_a_restart_and_another_batch_begin_anew() -> None:
    frames, form = video(3, 6), FORMS["hybrid"]
    fusion = TemporalFusion(keyframe=100, layer=2, **form)
    model = tokred.compile(build("llava", layers=3), fusion, lower="eager")
    by_hand = ByHand("llava", keyframe=100, layer=2, **form)
    for number, (pixels, batch) in enumerate(zip(frames, [3, 3, 3, 2, 2, 3], strict=True)):
        given = {**prompts(batch, model="llava"), "pixel_values": pixels[:batch]}
        if number == 2:
            fusion.restart()
        if number in (2, 3, 5):
            by_hand.step = 0
        with torch.no_grad():
            close(model(**given).logits, by_hand(given), given)
    assert [reused > 0 for reused in by_hand.reused] == [False, True, False, False, True, False]


@pytest.mark.slow
def test_tokens_may_be_dropped_behind_the_layer_that_is_looked_at() -> None:
    inputs, frames, form = prompts(3, model="llava"), video(3, 4), {"pixel": 0.3, "relevant": 0.2}
    by_hand = ByHand("llava", keyframe=100, layer=1, **form)
    model = tokred.compile(
        build("llava", layers=3),
        [TemporalFusion(keyframe=100, layer=1, **form), parse_recipe("fastv(layer=2, keep=0.5)")],
        lower="eager",
        strict=True,
    )
    for pixels in frames:
        given = {**inputs, "pixel_values": pixels}
        wanted = by_hand(given, oracle.fastv(2, 0.5))
        with torch.no_grad():
            output = model(**given)
        rows = output.past_key_values.layers[-1].rows
        real = inputs["attention_mask"].gather(1, rows).bool()
        got, full = (x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for x in (output.logits, wanted))
        assert (got[real] - full[real]).abs().max() < 1e-9 * full[real].abs().max()


@pytest.mark.slow
def test_what_is_dropped_in_front_of_that_layer_has_no_attention_to_look_at() -> None:
    model = tokred.compile(build("llava", layers=3), "temporal_fusion(layer=2) + fastv(layer=2)", lower="eager")
    with torch.no_grad():
        model(**prompts(2, model="llava"))
    refusals = [r for graph in tokred.reports().graphs for p in graph.passes for r in p.refusals if r.code != "recipe"]
    assert [refusal.code for refusal in refusals] == ["cut-before"]
    assert "fastv" in refusals[0].reason


@pytest.mark.slow
def test_inductor_and_verify_see_the_same_frames() -> None:
    inputs, frames = prompts(2, model="llava"), [frame.float() for frame in video(2, 3)]
    recipe = {"recipe": "temporal_fusion(layer=2, pixel=0.3, relevant=0.2)"}
    given: dict[str, dict[str, Any]] = {
        "inductor": recipe | {"lower": "inductor", "verify": True},
        "eager": recipe | {"lower": "eager"},
    }
    switch = Switch({way: parse_options(each, companion=True) for way, each in given.items()})
    model = with_pruned_caches(build("llava", torch.float32, layers=3), partial(torch.compile, backend=switch))
    for pixels in frames:
        logits = []
        for switch.way in given:
            with torch.no_grad():
                logits.append(model(**{**inputs, "pixel_values": pixels}).logits)
        left, right = logits
        assert (left - right).abs().max() < 1e-3 * right.abs().max()


@pytest.mark.slow
def test_it_is_explained_and_refused_where_no_encoder_shows() -> None:
    inputs = prompts(2, model="llava")
    report = str(tokred.explain(build("llava", layers=3), recipe="temporal_fusion()", **inputs))
    assert "saves no compute" in report
    model = tokred.compile(build("internvl", layers=3), "temporal_fusion()", lower="eager", strict=True)
    with pytest.raises(BackendCompilerFailed, match="no-vision-tower") as raised, torch.no_grad():
        model(**prompts(2, model="internvl"))
    assert isinstance(raised.value.inner_exception, StrictError)


@pytest.mark.slow
def test_a_text_decoder_has_no_frames() -> None:
    inputs, model = prompts(), build("llama", layers=3)
    compiled = tokred.compile(model, "temporal_fusion()", lower="eager", spans={"visual": SPAN})
    with torch.no_grad():
        close(compiled(**inputs).logits, model(**inputs).logits, inputs)
    refusals = [
        r.code for graph in tokred.reports().graphs for p in graph.passes for r in p.refusals if r.code != "recipe"
    ]
    assert refusals == ["no-vision-tower"]


@pytest.mark.parametrize("argument", ["keyframe=0", "pixel=-1", "pixel='x'", "relevant=2", "layer=-1", "layers=[3]"])
def test_arguments_out_of_range_are_errors(argument: str) -> None:
    with pytest.raises(ArgumentError, match=argument.partition("=")[0]):
        parse_recipe(f"temporal_fusion({argument})")


@pytest.mark.slow
def test_neurons_are_left_out_of_a_graph_that_carries_something() -> None:
    """The first frame is the model's own: what differs from it is the neurons'."""
    sparse, inputs = "cats(threshold=0.3, phase='masked')", prompts(2, model="llava")
    logits = []
    for recipe in (sparse, f"temporal_fusion() + {sparse}"):
        torch.compiler.reset()
        tokred.reset()
        with torch.no_grad():
            logits.append(tokred.compile(build("llava", layers=3), recipe, lower="eager")(**inputs).logits)
    (graph,) = tokred.reports().graphs
    assert graph.notes == []
    changes = {entry.name: entry.changes for entry in graph.passes}
    assert (changes["fuse_frames"], changes["sparsify"]) == (1, 3)
    assert torch.equal(*logits)
