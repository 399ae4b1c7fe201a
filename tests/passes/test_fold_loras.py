"""Low-rank branches are merged or made smaller with the same numbers, and follow their parameters."""

import gc
import logging
from functools import partial

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import tokred
from tests.one_capture import Ways
from tests.passes.lora_models import RANK, PeftLinear, SoraLinear, adapted
from tests.passes.sparse_models import MODELS, example, linears, made
from tests.passes.test_skip_weights import generated, limits_of, only_decoding, same
from tests.passes.test_sparsify import run
from tokred.compiler import pipeline
from tokred.compiler.relaid import Relaid
from tokred.registry.sparsify.lora_prune import Branch, Kept, Merged
from tokred.testing.contract import words
from tokred.testing.models import TinyText

pytestmark = pytest.mark.slow
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest number
aten = torch.ops.aten
PRODUCTS = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default}
ADAPTERS = {
    "peft": PeftLinear,
    "two": partial(PeftLinear, names=("one", "other")),
    "float32": partial(PeftLinear, dtype=torch.float32),
    "sora": SoraLinear,
}


def compiled(model, recipe="lora_prune()", **options):
    torch.compiler.reset()
    tokred.reset()
    given = {"recipe": recipe, "lower": "eager", "strict": True, **options}
    return torch.compile(model, backend="tokred", fullgraph=True, options=given)


def in_ways(ways, model, **common):
    """The backend, and the model compiled with it."""
    torch.compiler.reset()
    tokred.reset()
    backend = Ways(ways, **{"strict": True, **common})
    return backend, backend.compile(model)


def close(got, wanted, dtype=None):
    bound = EXACT[dtype or wanted.dtype]
    torch.testing.assert_close(got, wanted, rtol=bound, atol=bound * float(wanted.abs().max()))


def entry(ways=None, name="fold_loras"):
    """What the pass says of the only graph."""
    (graph,) = tokred.reports().graphs if ways is None else ways.reports[ways.way]
    (found,) = [each for each in graph.passes if each.name == name]
    return found


@pytest.fixture
def lowered(monkeypatch):
    """The graphs that are lowered."""
    found, lower = [], pipeline.lower

    def keep(gm, inputs, **how):
        found.append(gm)
        return lower(gm, inputs, **how)

    monkeypatch.setattr(pipeline, "lower", keep)
    return found


def products(gm):
    return sum(node.target in PRODUCTS for node in gm.graph.nodes)


MERGED, KEPT = BOTH = ("lora_prune()", "lora_prune(merge=False)")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_computes_the_same(name, lowered, subtests):
    model = adapted(made(name), SoraLinear if name in ("llama", "vit") else PeftLinear)
    plain = len(linears(made(name)))
    inputs = example(name)
    wanted = run(model, inputs)
    heads = 0 if name == "vit" else 1
    zero = 2 if name in ("llama", "vit") else 1
    ways, fast = in_ways(BOTH if name in ("llama", "gpt2", "vit") else [MERGED], model)
    for number, way in enumerate(ways):
        with subtests.test(way):
            close(run(fast, inputs), wanted)
            assert products(lowered[number]) == (plain if way == MERGED else 3 * plain) + heads
            assert len(entry(ways).lines) == plain
            assert all(f": {zero} of {RANK} ranks are zero, " in line for line in entry(ways).lines)
            assert all(row.method.startswith("lora_prune") and row.refusal is None for row in ways.report.blocks)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_in_every_type(adapter, dtype):
    torch.manual_seed(0)
    conv, plain = Conv1D(24, 16).to(dtype), nn.Linear(24, 16).to(dtype)
    nn.init.normal_(conv.weight, std=0.3)
    make = ADAPTERS[adapter]
    model = nn.Sequential(make(conv), nn.GELU(), make(plain)).eval().requires_grad_(False)
    x = torch.randn(3, 5, 16).to(dtype)
    wanted = model(x)
    ways, fast = in_ways(BOTH, model)
    for ways.way in BOTH:
        with torch.no_grad():
            close(fast(x), wanted, torch.float32 if adapter == "float32" and dtype == torch.float64 else dtype)
        assert len(entry(ways).lines) == 2 and not entry(ways).refusals


def test_a_decoder_generates_the_same_and_compiles_no_token_anew():
    model, ids = adapted(made("llama", torch.float32, layers=1), PeftLinear), example("llama")
    wanted = generated(model, ids, tokens=12)
    ways = Ways(BOTH, lower="aot_eager", strict=True, verify=True)
    fast = ways.generating(model)
    for ways.way in BOTH:
        same(generated(fast, ids, tokens=12), wanted)
        assert len(ways.reports[ways.way]) == 3  # prompt, first token, tokens behind a cache of run-time length
        for graph in ways.reports[ways.way]:
            assert all(row.method and not row.refusal for row in graph.blocks)


def step(model):
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(example("llama")).logits.square().mean().backward()
    optimizer.step()
    model.requires_grad_(False)


def other(model):
    model.load_state_dict({name: value * 1.1 + 0.01 for name, value in model.state_dict().items()})


def test_folded_weights_follow_their_parameters():
    model, inputs = adapted(made("llama"), SoraLinear), example("llama")
    ways, fast = in_ways(BOTH, model)
    for change in (None, other, step):
        before = run(model, inputs)
        if change:
            change(model)
        wanted = run(model, inputs)
        assert change is None or (wanted - before).abs().max() > 1e-3
        for ways.way in BOTH:
            close(run(fast, inputs), wanted)
    assert len(ways.reports[MERGED]) == 1


def two(adapter):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)).double()
    return adapted(plain, adapter), torch.randn(5, 16, dtype=torch.float64)


@torch.no_grad()
def test_ranks_that_come_back_run_uncompiled_and_are_told(caplog):
    model, x = two(SoraLinear)
    fast = compiled(model, KEPT, lower="aot_eager")
    close(fast(x), model(x))
    gates = [parameter for name, parameter in model.named_parameters() if name.endswith("gate")]
    for values in ([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]):
        for gate in gates:
            gate.copy_(torch.tensor([values]))
        with caplog.at_level(logging.WARNING, "tokred"):
            close(fast(x), model(x))
    assert [record.message for record in caplog.records] == [
        "parameters have outgrown what was compiled: it runs uncompiled until torch.compiler.reset()"
    ]
    close(compiled(model, KEPT, lower="aot_eager")(x), model(x))
    assert all(f"{RANK} of {RANK} ranks are zero" in line for line in entry().lines)


@torch.no_grad()
def test_the_report_states_the_memory_and_graphs_share_it():
    model, x = two(PeftLinear)
    gc.collect()
    start = Relaid.total()
    for recipe, each in ((MERGED, 24 * 16), (KEPT, 3 * (24 + 16))):
        compiled(model, recipe)(x)
        size = 2 * each * 8
        assert Relaid.total() - start == size
        (note,) = tokred.reports().graphs[0].notes
        assert note.endswith(f"held beside those that they are made of: {size / 2**20:.1f} MiB")
        start += size
    compiled(model)(x[:1])
    assert Relaid.total() == start


def test_methods_that_skip_weights_read_the_merged_ones():
    plain, ids = made("llama", torch.float32, layers=1), example("llama")[:1]
    model = adapted(plain, PeftLinear)
    calibration = tokred.calibrate(model, [ids], recipe="teal", progress=False)
    limits = {name.replace(".base_layer", ""): t for name, t in limits_of(calibration, "input", 0.4).items()}
    masked, handles = only_decoding(limits), []
    for name, module in model.named_modules():
        if isinstance(module, PeftLinear):
            hook = partial(lambda m, args, name: (masked(name, args[0]),), name=f"{name}.weight")
            handles.append(module.register_forward_pre_hook(hook))
    wanted = generated(model, ids)
    for handle in handles:
        handle.remove()
    torch.compiler.reset()
    tokred.reset()
    recipe = "lora_prune() + teal(sparsity=0.4)"
    fast = tokred.compile(model, recipe, lower="eager", fullgraph=True, strict=True, calibration=calibration)
    got = generated(fast, ids)
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-4, atol=1e-4 * float(wanted[1].abs().max()))
    notes = tokred.reports().graphs[1].notes  # the merged weights are read in their copies alone
    assert [note.partition(":")[0] for note in notes] == ["7 weights are kept a second time, neuron by neuron"]


# -- refusals ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """One linear with an adapter, written as `forward` says."""

    def __init__(self, forward, rank=RANK):
        super().__init__()
        self.base, self.up = nn.Linear(16, 16), nn.Linear(rank, 16, bias=False)
        self.down, self.biased = nn.Linear(16, rank, bias=False), nn.Linear(16, rank)
        self.gate = nn.Parameter(torch.randn(rank))
        self.column = nn.Parameter(torch.randn(rank, 1))
        self.wide, self.scale = nn.Parameter(torch.randn(16)), nn.Parameter(torch.tensor(3.0))
        self.run = forward
        self.requires_grad_(False)

    def forward(self, x):
        return self.run(self, x)


def refused(model, x, **options):
    got = compiled(model, strict=False, **options)(x)
    torch.testing.assert_close(got, model(x))
    return [refusal.code for refusal in entry().refusals]


FOLDED = {
    "plain": lambda m, x: m.base(x) + m.up(m.down(x)),
    "turned": lambda m, x: m.up(m.down(x)) * 2 + m.base(x),
    "divided": lambda m, x: m.base(x) + m.up(m.down(x) / 8),
    "gated": lambda m, x: m.base(x) + m.up(m.gate * m.down(x)),
    "rows": lambda m, x: m.base(x) + m.up(m.down(x.flatten(0, 1))).view(x.shape),
    "product": lambda m, x: m.base(x) + x @ m.down.weight.T @ m.up.weight.T,
    "number": lambda m, x: m.base(x) + m.up(m.down(x)) * m.scale,
}
NOT_FOLDED = {
    "other input": (lambda m, x: m.base(x) + m.up(m.down(x + 1)), "no-lora"),
    "activation": (lambda m, x: m.base(x) + m.up(m.down(x).relu()), "no-lora"),
    "no sum": (lambda m, x: m.base(x) * m.up(m.down(x)), "no-lora"),
    "gate of outputs": (lambda m, x: m.base(x) + m.up(m.down(x)) * m.wide, "no-lora"),
    "gate of tokens": (lambda m, x: m.base(x) + m.up(m.down(x) * m.column), "no-lora"),
    "rounded": (lambda m, x: m.base(x) + m.up(m.down(x).to(torch.int32).to(x.dtype)), "no-lora"),
    "none": (lambda m, x: m.base(x), "no-lora"),
    "bias": (lambda m, x: m.base(x) + m.up(m.biased(x)), "branch"),
    "read twice": (lambda m, x: (y := m.base(x)) * (y + m.up(m.down(x))), "branch"),
    "broadcast": (lambda m, x: m.base(x) + m.up(m.down(x)).unsqueeze(0), "branch"),
    "computed": (lambda m, x: m.base(x) + nn.functional.linear(m.down(x), m.up.weight * 2), "weight"),
}


@pytest.mark.parametrize("name", FOLDED)
def test_spellings(name):
    torch.manual_seed(0)
    with torch.no_grad():
        model, x = Net(FOLDED[name]), torch.randn(2, RANK, 16)
        ways, fast = in_ways([MERGED] if name == "rows" else BOTH, model)
        for _ in ways:
            torch.testing.assert_close(fast(x), model(x))
            assert len(entry(ways).lines) == 1 and not entry(ways).refusals


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_near_misses(name):
    torch.manual_seed(0)
    function, code = NOT_FOLDED[name]
    with torch.no_grad():
        assert refused(Net(function), torch.randn(2, RANK, 16)) == [code]
        assert entry().lines == []


def test_dropout_in_training_and_wanted_gradients_are_refused():
    model, x = adapted(nn.Sequential(nn.Linear(16, 16)), PeftLinear), torch.randn(3, 16)
    with torch.no_grad():
        compiled(model.train(), strict=False)(x)
        assert [refusal.code for refusal in entry().refusals] == ["dropout"]
        assert refused(model.eval(), x) == []
    model[0].lora_A.requires_grad_(True)
    assert refused(model, x) == ["gradient"]
    assert "lora_A.default.weight: the weight's gradient is wanted" in entry().refusals[0].reason
    got = torch.autograd.grad(compiled(model, strict=False)(x).sum(), list(model[0].lora_A.parameters()))
    wanted = torch.autograd.grad(model(x).sum(), list(model[0].lora_A.parameters()))
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        assert refused(model, x) == []  # the same weights, but nobody asks
    with pytest.raises(Exception, match=r"lora_prune.*gradient"):
        compiled(model)(x)


LAYERS = {"[1]": 7, "'0:1'": 7, "'*q_proj*'": 2, "'*mlp*'": 6, "[5]": 0}


def test_layers(subtests):
    model, inputs = adapted(made("llama"), PeftLinear), example("llama")
    wanted = run(model, inputs)
    ways, fast = in_ways([f"lora_prune(layers={layers})" for layers in LAYERS], model, strict=False)
    for way, folded in zip(ways, LAYERS.values(), strict=True):
        with subtests.test(way):
            close(run(fast, inputs), wanted)
            assert len(entry(ways).lines) == folded


def test_an_encoder_with_padding_is_folded_and_the_report_says_that_it_is_not_packed():
    torch.manual_seed(0)
    model, (ids, valid) = TinyText().eval(), words(4)
    for block in model.blocks:
        block.out = SoraLinear(block.out)
    model.requires_grad_(False)
    wanted = model(ids, valid)
    with torch.no_grad():
        got = compiled(model)(ids, valid)
    for name, value in wanted.items():
        close(got[name], value)
    assert len(entry().lines) == 3
    assert [refusal.code for refusal in entry(name="pack_tokens").refusals] == ["recipe"]


def test_an_adapted_head_belongs_to_no_layer():
    model, inputs = made("llama", layers=1), example("llama")
    model.lm_head = PeftLinear(model.lm_head)
    model.eval().requires_grad_(False)
    first = "lora_prune(layers=[0])"
    ways, fast = in_ways({MERGED: {}, first: {"strict": False}}, model)
    close(run(fast, inputs), run(model, inputs))
    assert entry(ways).lines == ["lm_head.base_layer.weight: 1 of 4 ranks are zero, merged into its weight"]
    ways.way = first
    assert entry(ways).lines == []


def test_arguments():
    with pytest.raises(tokred.errors.ArgumentError, match="merge"):
        tokred.Recipe((tokred.methods()["lora_prune"](merge=1),))


# -- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("gates", [0, 1, 2])
def test_what_is_made_of_the_parameters(rows, gates):
    torch.manual_seed(0)
    weight, down, up = (torch.randn(n, m, dtype=torch.float64) for n, m in ((7, 5), (3, 5), (7, 3)))
    gate = [torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)][:gates]
    g = torch.ones(3, dtype=torch.float64)
    for each in gate:
        g = g * each
    wanted = weight + 0.5 * up @ torch.diag(g) @ down
    turned = (lambda w: w) if rows else (lambda w: w.t())
    branch = Branch(0.5, gates, down=rows, up=rows)
    parts = [turned(down), turned(up), *gate]
    got = Merged((branch,), rows)(turned(weight), *parts)
    torch.testing.assert_close(turned(got), wanted, rtol=0, atol=1e-14)
    for ranks in (0, 2, 3):
        first, second = (Kept(branch, ranks, up=part)(*parts) for part in (False, True))
        assert len(first) == second.shape[1] == max(ranks, 3 if gates == 0 else 2)
        torch.testing.assert_close(weight + second @ first, wanted, rtol=0, atol=1e-14)


@torch.no_grad()
def test_through_inductor():
    model, x = two(SoraLinear)
    ways, fast = in_ways(BOTH, model.float(), lower="inductor")
    for ways.way in BOTH:
        close(fast(x.float()), model(x.float()))
        assert len(entry(ways).lines) == 2
