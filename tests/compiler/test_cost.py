"""What the report says a rewrite saves, and which sites the gate lets through on a given machine."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokred
from tests.compiler.test_work import analysed
from tokred.compiler.blocks import Attention
from tokred.compiler.cost import Costs, Gate
from tokred.compiler.machine import Extent, Machine, method_seconds
from tokred.compiler.options import parse_options
from tokred.compiler.pipeline import Compiled, transform
from tokred.compiler.suffix import Suffix, follow
from tokred.compiler.symbolic import Symbols
from tokred.registry.method import Reduction
from tokred.registry.recipe import parse_recipe
from tokred.registry.site import Place
from tokred.testing.models import Block, TinyViT

PIXELS = torch.randn(2, 3, 12, 12)
EVEN = Machine("even", {torch.float32: 1e9, torch.bfloat16: 1e9}, 1e9, 1e-5)


def transformed(model: nn.Module, *inputs: Tensor, **options: Any) -> tuple[Compiled, int]:
    """The rewritten graph with its report, under the backend's options; and the FLOPs that it really does."""
    done: list[tuple[Compiled, int]] = []

    def backend(gm: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        found = transform(gm, example, parse_options(options), lambda stage, graph: None)

        def run(*args: Any) -> Any:
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                result = found.graph(*args)
            done.append((found, counter.get_total_flops()))
            return result

        return run

    torch.compiler.reset()
    # the counter knows the plain kernel alone; tracing must see the strides that it gives
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        torch.compile(model, backend=backend)(*inputs)
    (only,) = done
    return only


# -- the report's FLOPs -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tome(r=8)", "evit(keep=0.5, layers=[0, 2])", "tomesd(ratio=0.5)"])
def test_flops_after_are_what_the_rewritten_graph_does(recipe: str) -> None:
    done, counted = transformed(TinyViT().eval(), PIXELS, recipe=recipe)
    assert len(done.applied) >= 2
    before, after = done.report.flops
    assert after == counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        TinyViT()(PIXELS)
    assert before == counter.get_total_flops()


def test_rows_of_tome_on_a_vit() -> None:
    """Tokens after each site, and the MLP behind it runs on as many; 4 B N C F FLOPs each."""
    done, _ = transformed(TinyViT().eval(), PIXELS, recipe="tome(r=8)", exact=False)
    attention = [row for row in done.report.blocks if row.kind == "attention"]
    mlp = [row for row in done.report.blocks if row.kind == "mlp"]
    assert [row.tokens for row in attention] == [(37, 29), (29, 21), (21, 13)]
    assert [row.tokens for row in mlp] == [(37, 29), (37, 21), (37, 13)]
    assert [row.flops for row in mlp] == [tuple(4 * 2 * n * 32 * 64 for n in row.tokens) for row in mlp]
    # the projections and the attention of a block run before its site: on the tokens that the one before left
    seen = [(37, 37), (37, 29), (37, 21)]
    assert [row.flops for row in attention] == [tuple(2 * (8 * n * 32**2 + 4 * n * n * 32) for n in ns) for ns in seen]


def test_rows_of_a_method_that_is_not_applied_do_not_change() -> None:
    done, _ = transformed(TinyViT().eval(), PIXELS, recipe="tome(r=8, layers=[])", exact=False)
    assert all(row.tokens[0] == row.tokens[1] and row.flops[0] == row.flops[1] for row in done.report.blocks)


def test_dead_tokens_show_in_the_row_of_the_mlp() -> None:
    class ClassTokenOnly(TinyViT):
        def forward(self, pixels: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(pixels)["logits"]

    done, _ = transformed(ClassTokenOnly().eval(), PIXELS)
    mlp = [row for row in done.report.blocks if row.kind == "mlp"]
    assert [row.tokens for row in mlp] == [(37, 37), (37, 37), (37, 1)]
    assert mlp[-1].flops == (4 * 2 * 37 * 32 * 64, 4 * 2 * 32 * 64)


def test_layers_that_share_a_module_are_told_apart() -> None:
    class Shared(TinyViT):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block()] * 3)

    done, _ = transformed(Shared().eval(), PIXELS, recipe="tome(r=8)", exact=False)
    plain, _ = transformed(TinyViT().eval(), PIXELS, recipe="tome(r=8)", exact=False)
    assert [(r.kind, r.tokens, r.flops) for r in done.report.blocks] == [
        (r.kind, r.tokens, r.flops) for r in plain.report.blocks
    ]


@pytest.mark.slow
def test_a_symbolic_batch_is_reported_in_numbers() -> None:
    x = PIXELS.clone()
    torch._dynamo.mark_dynamic(x, 0)
    dynamic, _ = transformed(TinyViT().eval(), x, recipe="tome(r=8)", exact=False)
    static, _ = transformed(TinyViT().eval(), PIXELS, recipe="tome(r=8)", exact=False)
    assert dynamic.report.flops == static.report.flops
    assert [r.tokens for r in dynamic.report.blocks] == [r.tokens for r in static.report.blocks]


def test_costs_of_an_unchanged_graph_are_the_same_twice() -> None:
    graph, _, blocks = analysed(TinyViT().eval(), PIXELS)
    costs = Costs(graph, graph)
    assert costs.totals()[0] == costs.totals()[1] > 0
    for mlp in blocks.mlps:
        assert costs.became(mlp.down) is mlp.down
        assert costs.nodes([mlp.down]) == (2 * 2 * 37 * 64 * 32,) * 2


# -- the gate ---------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Blocks of tests' own width behind each other; the class token is read, or everything."""

    def __init__(self, depth: int = 3, everything: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.everything = everything

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.everything else x[:, 0]


def asked(model: nn.Module, x: Tensor, recipe: str, machine: Machine, *, refuse: bool = True) -> tuple[Gate, list[Any]]:
    """A gate that was asked about every block, as if nothing had been removed before it, and its answers."""
    graph, axes, blocks = analysed(model.eval(), x)
    gate = Gate(graph, blocks, axes, refuse=refuse, machine=machine)
    (method,) = parse_recipe(recipe).methods
    return gate, [gate(block, method, *_site(block, method, x)) for block in blocks.attentions]


def _site(block: Attention, method: Reduction, x: Tensor) -> tuple[Place, Any, Suffix]:
    trip = method.scope == "round_trip"
    cut = block.entry if trip else block.stream
    assert cut is not None
    users = block.entry_users if trip else None
    exits = frozenset([block.join]) if trip else frozenset()
    suffix = follow(cut, block.batch_dim, block.token_dim, consumers=users, exits=exits)
    place = Place(layer=block.layer, depth=block.depth, tokens=x.shape[1], head=1, grid=(6, 6))
    return place, method.removed(place), suffix


def saved(gate: Gate) -> list[float]:
    return [prediction.saves for prediction in gate.predictions.values()]


def test_the_saving_is_the_cost_polynomial_at_both_lengths() -> None:
    """Compute alone: behind the last site is one MLP and nothing else; one block earlier, a whole block more."""
    n, c, f, removed = 37, 32, 64, 8
    pure = replace(EVEN, bandwidth=float("inf"))
    gate, _ = asked(Stack(2), torch.randn(2, n, c), f"tome(r={removed})", pure)
    early, late = saved(gate)
    assert late == pytest.approx(2 * 4 * removed * c * f / 1e9)
    attention = 2 * (8 * removed * c * c + 4 * (n * n - (n - removed) ** 2) * c) / 1e9
    assert early == pytest.approx(2 * late + attention)


def test_saving_grows_with_the_batch_and_falls_with_the_layer() -> None:
    one, _ = asked(Stack(), torch.randn(1, 37, 32), "tome(r=8)", EVEN)
    eight, _ = asked(Stack(), torch.randn(8, 37, 32), "tome(r=8)", EVEN)
    assert saved(one) == sorted(saved(one), reverse=True)
    assert all(b > 7 * a for a, b in zip(saved(one), saved(eight), strict=True))


def test_only_sites_that_pay_are_let_through() -> None:
    """The machine is chosen so that the method costs as much as the middle of three sites saves, and a little less."""
    x = torch.randn(2, 37, 32)
    free = replace(EVEN, kernel=0.0)
    gate, _ = asked(Stack(), x, "tome(r=8)", free)
    _, middle, _ = gate.predictions.values()
    exact = replace(EVEN, kernel=0.99 * (middle.saves - middle.costs) / 8)
    gate, (first, second, last) = asked(Stack(), x, "tome(r=8)", exact)
    assert (first, second) == (None, None)
    assert last.code == "does-not-pay"
    assert "predicted to save" in last.reason
    assert "blocks.2" in last.where
    notes = list(gate.notes.values())
    assert ["does not pay" in note for note in notes] == [False, False, True]


def test_without_refusing_the_two_numbers_are_only_noted() -> None:
    slow = replace(EVEN, kernel=1.0)
    gate, answers = asked(Stack(), torch.randn(2, 37, 32), "tome(r=8)", slow, refuse=False)
    assert answers == [None] * 3
    assert all("costs 8e+03 ms: does not pay" in note for note in gate.notes.values())


def test_a_round_trip_saves_in_its_own_attention_only() -> None:
    gate, _ = asked(Stack(), torch.randn(2, 37, 32), "tomesd(ratio=0.5)", EVEN)
    first, *rest = saved(gate)
    assert first > 0
    assert rest == pytest.approx([first, first])


def test_restoring_the_output_is_part_of_the_cost() -> None:
    x = torch.randn(2, 37, 32)
    free = replace(EVEN, kernel=0.0)
    costs = [
        [p.costs for p in asked(Stack(everything=everything), x, "tome(r=8)", free)[0].predictions.values()]
        for everything in (False, True)
    ]
    assert [b - a for a, b in zip(*costs, strict=True)] == pytest.approx([2 * x.nbytes / 1e9] * 3)


def test_what_needs_all_tokens_saves_nothing_and_costs_a_restore() -> None:
    class Mixed(Stack):
        """The third block sees tokens that a convolution along the sequence has mixed."""

        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv1d(32, 32, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[1](self.blocks[0](x))
            return self.blocks[2](self.mix(x.transpose(1, 2)).transpose(1, 2))[:, 0]

    x = torch.randn(2, 37, 32)
    free = replace(EVEN, kernel=0.0)
    plain, _ = asked(Stack(2), x, "tome(r=8)", free)
    mixed, _ = asked(Mixed(), x, "tome(r=8)", free)
    two = list(mixed.predictions.values())[:2]
    assert [p.saves for p in two] == pytest.approx(saved(plain), rel=0.05)  # the convolution runs at full length
    extra = [m.costs - p.costs for m, p in zip(two, plain.predictions.values(), strict=True)]
    assert extra == pytest.approx([2 * x.nbytes / 1e9] * 2)


def test_the_report_shows_the_refusal() -> None:
    """37 tokens of 32 channels are too few to pay anywhere: two numbers without the gate, a refusal with it."""
    torch.compiler.reset()
    model = TinyViT().eval()
    free = tokred.explain(model, PIXELS, recipe="tome(r=8)", options={"exact": False})
    rows = [row for row in free.graphs[0].blocks if row.kind == "attention"]
    assert [row.method for row in rows] == ["tome(r=8, prop_attn=True, order='tome')"] * 3
    assert all(row.note.startswith("saves ") and row.note.endswith("does not pay") for row in rows)
    gated = tokred.explain(model, PIXELS, recipe="tome(r=8)", options={"exact": False, "gate": True})
    (graph,) = gated.to_json()["graphs"]
    refusals = [block["refusal"] for block in graph["blocks"] if block["kind"] == "attention"]
    assert [refusal["code"] for refusal in refusals] == ["does-not-pay"] * 3
    assert all("ms" in refusal["reason"] and refusal["where"] for refusal in refusals)
    assert graph["flops"]["before"] == graph["flops"]["after"]


# -- machines and methods ---------------------------------------------------------------------------------------------

SITE = Extent(batch=8, tokens=197, removed=13, channels=384, heads=6, head_dim=64)


def method(recipe: str) -> Reduction:
    (only,) = parse_recipe(recipe).methods
    return only


def test_seconds_by_type_of_number() -> None:
    machine = Machine("", {torch.float32: 1e9, torch.bfloat16: 4e9}, 1e9, 1e-6)
    assert machine.seconds({torch.float32: 1e9}, 0) == 1
    assert machine.seconds({torch.bfloat16: 1e9}, 2e9, 5) == pytest.approx(0.25 + 2 + 5e-6)
    assert machine.seconds({torch.int8: 1e9}, 0) == 1  # not in the list: as slow as the slowest


def test_a_cpu_is_as_fast_as_it_has_threads() -> None:
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = Machine.of(torch.device("cpu"))
        torch.set_num_threads(2)
        two = Machine.of(torch.device("cpu"))
    finally:
        torch.set_num_threads(count)
    assert two.flops[torch.float32] == 2 * one.flops[torch.float32]
    assert Machine.of(torch.device("cuda")).flops[torch.float16] > 100 * two.flops[torch.float32]


def test_methods_cost_what_they_compute() -> None:
    """Matching is quadratic in tokens, ranking by the class token linear, and clustering dearest."""
    compute = replace(EVEN, bandwidth=float("inf"), kernel=0.0)
    matching = method_seconds(method("tome(r=13)"), SITE, compute)
    assert matching == pytest.approx(2 * 8 * 98 * 98 * 64 / 1e9)
    half = replace(SITE, tokens=98)
    assert matching == pytest.approx(4 * method_seconds(method("tome(r=13)"), half, compute), rel=0.02)
    ranking = method_seconds(method("evit(keep=0.5)"), SITE, compute)
    assert ranking == pytest.approx(2 * 8 * 6 * 197 * 64 / 1e9)
    assert method_seconds(method("random(keep=0.5)"), SITE, compute) == 0
    assert method_seconds(method("expedit(keep=0.5)"), SITE, compute) > matching > ranking
    dearest_first = map(method, ("expedit(keep=0.5)", "tome(r=13)", "random(keep=0.5)"))
    real = [method_seconds(each, SITE, EVEN) for each in dearest_first]
    assert real == sorted(real, reverse=True)


def test_tokens_of_the_axis_are_named_in_slices_too() -> None:
    """A patch axis without its class token is N - 1, and its cost falls with N."""

    class Patches(Stack):
        def __init__(self) -> None:
            super().__init__(2)
            self.score = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            x = self.blocks[1](self.blocks[0](x))
            return x[:, 0], F.relu(self.score(x[:, 1:])).mean(1)

    _, axes, blocks = analysed(Patches().eval(), torch.randn(2, 37, 32))
    symbols = Symbols(axes, blocks, blocks.attentions[0].axis)
    (score,) = (n for n in axes._dims if "linear" in n.name and symbols.sizes(n)[1] == symbols.tokens - 1)
    work, *_ = symbols.work(score)
    assert work.subs(symbols.values) == 2 * 2 * 36 * 32 * 32
