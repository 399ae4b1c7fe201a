"""Every registered method, plug-ins included, keeps the contract; and the contract notices those that do not."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

import tokred
from tests.passes.test_adapt_width import weights
from tokred import Keep, Merge, Reduction, Soft
from tokred.registry.recipe import parse_recipe
from tokred.testing import TinyViT, check_method, idle
from tokred.testing.maps import check_plans


def routers(layers=12, channels=32):
    """For the sites and the models of the contract, which have so many channels."""
    generator = torch.Generator().manual_seed(1)
    weights = {f"layers.{n}.router.weight": torch.randn(1, channels, generator=generator) for n in range(layers)}
    return weights | {f"layers.{n}.router.bias": torch.tensor([n / 10]) for n in range(layers)}


IMPORTS = {  # what a method cannot do without
    "mixture_of_depths": {"routers": routers()},
    "skip_block": {"weights": [0.5, 0.1, 0.9], "ratio": 0.4, "blocks": "both"},
    "adaptive_width": {"learners": weights(layers=3, channels=32, dtype=torch.float32)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(tokred.methods()))
def test_method_keeps_the_contract(name):
    check_method(tokred.methods()[name](**IMPORTS.get(name, {})))


@pytest.mark.slow
def test_greedy_shares_keep_the_contract():
    check_method("teal(allocation='greedy')")


VARIANTS = [
    "catp(keep=0.3, weight=5)",
    "catp(keep=0.3, images=4)",
    "evit(keep=0.4, fuse=False)",
    "aim(keep=[0.5, 0.7, 0.3], layers=[0, 4, 9])",
    "aim(keep=[1, 0.5], layers=[0, 7])",
    "hidrop(keep=[0.5, 0.25], layers=[4, 9])",
    "hidrop(keep=[0, 1, 0.5], layers=[0, 3, 6])",
    "sparsevlm(keep=0.4, layers=5)",
    "evit(ratio=0.9)",
    "expedit(layer=-1, grid=(3, 2), iterations=1, window=1, top_k=1)",
    "expedit(layer=0, grid=(5, 6), tau=0.1, window=3)",
    "norm(keep=0.1, layers=[0])",
    "pitome(keep=0.5, prop_attn=True)",
    "pitome(ratio=[0.5, 0.3])",
    "pool(keep=0.03)",
    "pool(ratio=0.1)",
    "random(keep=0.7, seed=3)",
    "todre(keep=0.5, exit=None)",
    "todre(keep=0.5, layers=[0, 3, 11])",
    "tofu(r=(9, -0.5))",
    "tome(r=100, order='preserve')",
    "tome(r=[0, 0, 3], prop_attn=False)",
    "tomesd(ratio=0.9, sx=3, sy=1, use_rand=False)",
    "tomesd(ratio=0.7, seed=1)",
    "todre(keep=0.5, pivot='mean')",
    "zoo_prune(keep=0.4, layer=2)",
    "zoo_prune(keep=0.4, probes=0)",
    "zoo_prune(probes=9, step=1, seed=4)",
    "elastic_pool(tokens=9)",
]


@pytest.mark.parametrize("recipe", VARIANTS)
def test_plans_of_other_options_keep_the_contract(recipe):
    assert check_plans(parse_recipe(recipe).methods[0]) > 0


# -- methods that break one promise each ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sound(Reduction):
    """Keeps the first rows. Each method below breaks it in one way."""

    keep: float = 0.5

    name: ClassVar[str] = "broken"

    def removed(self, place):
        return place.free - place.count(self.keep)

    def score(self, site):
        return -site.arange(0, site.tokens).float()

    def plan(self, site):
        return site.keep_top(self.score(site), site.count(self.keep))


class Miscounts(Sound):
    def removed(self, place):
        return max(super().removed(place) - 1, 0)


class DropsTheClassToken(Sound):
    def plan(self, site):
        return Keep(site.arange(self.removed(site), site.tokens))


class Reorders(Sound):
    causal_safe = True

    def plan(self, site):
        rows = site.arange(site.head, site.head + site.count(self.keep)).flip(1)
        return Keep(site.with_protected(rows))


class DrawsAnew(Sound):
    def score(self, site):
        return torch.rand(site.batch, site.tokens)


class WritesToItsInput(Sound):
    def plan(self, site):
        site.hidden.mul_(2)
        return super().plan(site)


class LooksAtOtherSamples(Sound):
    def score(self, site):
        return site.hidden.sum((0, 2)).expand(site.batch, -1)


class ReturnsATensor(Sound):
    def plan(self, site):
        return super().plan(site).index


class AddsInsteadOfAveraging(Sound):
    def plan(self, site):
        kept = site.head + site.count(self.keep)
        keep = site.with_protected(site.arange(site.head, kept))
        src = site.arange(kept, site.tokens - site.tail)
        into = torch.full_like(src, kept - 1)
        return Merge(keep, src, into, torch.ones(keep.shape), torch.ones(src.shape))


class LosesSizes(AddsInsteadOfAveraging):
    def plan(self, site):
        summed = super().plan(site)
        mean = Merge.mean(summed.keep, summed.src, summed.into, site.sizes())
        return replace(mean, size=mean.size.clamp(max=1))


class ForgetsTheTail(Sound):
    """A dense map whose protected rows are blurred."""

    def plan(self, site):
        kept = site.tokens - self.removed(site)
        matrix = torch.full((site.batch, kept, site.tokens), 1 / site.tokens, dtype=site.hidden.dtype)
        return Soft(matrix, matrix.transpose(1, 2))


class DividesByZero(AddsInsteadOfAveraging):
    def plan(self, site):
        summed = super().plan(site)
        return replace(summed, src_weight=summed.src_weight / 0)


class ReturnsAMapOfItsOwn(Sound):
    def plan(self, site):
        class Mine(Keep):
            pass

        return Mine(super().plan(site).index)


class AlwaysRemoves(Sound):
    def removed(self, place):
        return max(super().removed(place), 1)


class NeverRemoves(Sound):
    def removed(self, place):
        return 0


BROKEN = [
    (Miscounts, r"removed\(\) promises 2\d tokens, the map gives"),
    (DropsTheClassToken, "the first 1 rows are protected"),
    (Reorders, "causal_safe, but rows change their order"),
    (DrawsAnew, "two plans from the same inputs differ"),
    (WritesToItsInput, "changed one of its inputs in place"),
    (LooksAtOtherSamples, "depend on the other samples"),
    (ReturnsATensor, r"plan\(\) returned Tensor, not a TokenMap"),
    (AddsInsteadOfAveraging, "a reduced constant is not that constant"),
    (LosesSizes, "the sizes do not add up"),
    (ForgetsTheTail, "rows are protected and must stay"),
    (DividesByZero, "gradients are not finite"),
    (ReturnsAMapOfItsOwn, "a Mine is no pytree"),
    (AlwaysRemoves, r"broken\(keep=1.0\) removes 1 of 37 tokens, not 0"),
    (NeverRemoves, "removes nothing at any of the sites"),
]


@pytest.mark.parametrize("broken, message", BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_promise_is_noticed(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_method(broken())


@dataclass(frozen=True)
class SoundMask(tokred.Sparsity):
    """Leaves out the smallest half of each token's numbers. Each below breaks it in one way."""

    sparsity: float = 0.5

    name: ClassVar[str] = "broken"
    acts_at: ClassVar[tuple[str, ...]] = ("gate",)

    def idle(self, place):
        return self.sparsity == 0

    def masked(self, values, place):
        size = values.abs()
        return torch.where(size <= size.median(-1, keepdim=True).values, 0, values)


class ActsAtNoRole(SoundMask):
    acts_at = ()


class NeverIdle(SoundMask):
    def idle(self, place):
        return False


class AlwaysIdle(SoundMask):
    def idle(self, place):
        return True


class Rescales(SoundMask):
    def masked(self, values, place):
        return 2 * super().masked(values, place)


class Widens(SoundMask):
    def masked(self, values, place):
        return super().masked(values, place).double()


class WritesThroughData(SoundMask):
    def masked(self, values, place):
        values.data[..., 0] = 0
        return super().masked(values, place)


class LeavesAll(SoundMask):
    def masked(self, values, place):
        return values + 0


class MasksAnew(SoundMask):
    def masked(self, values, place):
        return torch.where(torch.rand(values.shape) < 0.5, 0, values)


class LooksAtTheBatch(SoundMask):
    def masked(self, values, place):
        return torch.where(values.abs() <= values.abs().max() / 3, 0, values)


class HasNoGradient(SoundMask):
    def masked(self, values, place):
        return super().masked(values, place) + 0 * (0 * values).sqrt()


BROKEN_MASKS = [
    (ActsAtNoRole, "acts_at is empty"),
    (NeverIdle, "should leave 'gate' alone"),
    (AlwaysIdle, "says that it leaves nothing out"),
    (Rescales, "changed numbers that it did not leave out"),
    (Widens, r"masked\(\) gives .*float64"),
    (WritesThroughData, "changed its input in place"),
    (LeavesAll, "leaves out 0%"),
    (MasksAnew, "two runs on the same input differ"),
    (LooksAtTheBatch, "mask depends on its batch"),
    (HasNoGradient, "gradients are not finite"),
]


@pytest.mark.parametrize("broken, message", BROKEN_MASKS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_mask_is_noticed(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_method(broken())


class ActsInNoLayer(SoundMask):
    acts_at = ("elsewhere",)


class MasksPrompts(SoundMask):
    """Whatever its phase."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "phase", "masked")


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken, message", [(ActsInNoLayer, "acts in no layer"), (MasksPrompts, "changes a prompt"), (SoundMask, "")]
)
def test_what_only_a_decoder_shows_of_a_mask_is_noticed(broken, message):
    with pytest.raises(AssertionError, match=message) if message else nullcontext():
        check_method(broken())


class BreaksWhenTraced(Sound):
    """Right on real tensors; reads a value while it is traced."""

    def plan(self, site):
        if site.hidden.sum().item() > 1e9:
            return Keep(site.arange(0, site.tokens))
        return super().plan(site)


class FixesTheBatch(Sound):
    """Right for every size on real tensors; the sizes that it is traced with become constants."""

    def plan(self, site):
        plan = super().plan(site)
        return Keep(plan.index.reshape(int(site.batch), -1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken, message",
    [(BreaksWhenTraced, "acts in no model: method-raised"), (FixesTheBatch, "graphs for 2 batch sizes, not one")],
)
def test_what_only_a_model_shows_is_noticed(broken, message):
    check_method(Sound())  # in whose trace the broken one is checked
    with pytest.raises(AssertionError, match=message):
        check_method(broken())
    check_method(Sound())  # which it left as it was, or is made again


class Mean(nn.Module):
    """No attention at all."""

    def forward(self, x):
        return x.mean(1)


def test_a_model_without_a_site_is_said_to_have_none():
    with pytest.raises(AssertionError, match="does not act in Mean: no site was offered"):
        check_method(Sound(), Mean(), (torch.randn(2, 9, 4),))


@pytest.mark.slow
def test_a_model_of_the_caller_is_checked():
    check_method("norm(keep=0.5)", TinyViT().eval(), (torch.randn(2, 3, 12, 12),))


def test_idle_names_what_is_missing():
    @dataclass(frozen=True)
    class Fixed(Reduction):
        name: ClassVar[str] = "fixed"

    with pytest.raises(AssertionError, match="fixed has no option r, ratio or keep"):
        idle(Fixed())


@pytest.mark.parametrize("recipe", ["tome(r=3)", "norm(keep=0.5)", "expedit(layer=1, grid=(2, 2))", "tomesd()"])
def test_idle_removes_nothing(recipe):
    method = idle(parse_recipe(recipe).methods[0])
    place = tokred.Place(layer=1, depth=4, tokens=17, head=1, grid=(4, 4))
    assert method.removed(place) == 0
