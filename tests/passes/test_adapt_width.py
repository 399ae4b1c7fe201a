"""Imported learners in the place of MLPs, against loops over tokens and learners that hooks run in the model."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, silu
from transformers.models.mixtral import MixtralConfig, MixtralForCausalLM

import tokred
from tests.one_capture import Ways
from tests.passes.sparse_models import MODELS, TWO, example, linears, made
from tests.passes.test_skip_weights import generated, same
from tests.passes.test_sparsify import run
from tokred.backends.kernels.learners import masked_learners, nested_learners
from tokred.errors import ArgumentError

LEARNERS, NEURONS, CHANNELS, GATE = 3, 5, 64, 8
FIRST = ("gate_proj", "gate_up_proj", "mlp.c_fc", "fc1", "intermediate.dense")
LAST = ("down_proj", "mlp.c_proj", "fc2", "output.dense")
AdaptiveWidth = tokred.methods()["adaptive_width"]


def weights(layers=2, channels=CHANNELS, dtype=torch.float64, seed=0):
    """As a checkpoint would have them; layer 1 without biases in its learners."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(layers):
        shapes = {
            "learners.up.weight": (LEARNERS, NEURONS, channels),
            "learners.down.weight": (LEARNERS, channels, NEURONS),
            "gate.up.weight": (GATE, channels),
            "gate.down.weight": (LEARNERS + 1, GATE),
            "gate.up.bias": (GATE,),
            "gate.down.bias": (LEARNERS + 1,),
        }
        if layer != 1:
            shapes |= {"learners.up.bias": (LEARNERS, NEURONS), "learners.down.bias": (LEARNERS, channels)}
        for name, shape in shapes.items():
            found[f"model.layers.{layer}.mlp.{name}"] = torch.randn(shape, generator=generator, dtype=dtype)
    return found


def by_hand(given, layer, x, act, gate_act, counts):
    """One token after the other, one learner after the other."""
    own = {name.removeprefix(f"model.layers.{layer}.mlp."): value for name, value in given.items()}
    y = torch.zeros_like(x)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).view(-1, x.dim() - 1):
        token = x[tuple(place)]
        logits = own["gate.down.weight"] @ gate_act(own["gate.up.weight"] @ token + own["gate.up.bias"])
        count = int((logits + own["gate.down.bias"]).argmax())
        counts.append(count)
        for n in range(count):
            hidden = own["learners.up.weight"][n] @ token
            if "learners.up.bias" in own:
                hidden = hidden + own["learners.up.bias"][n]
            y[tuple(place)] += own["learners.down.weight"][n] @ act(hidden)
            if "learners.down.bias" in own:
                y[tuple(place)] += own["learners.down.bias"][n]
    return y


@contextmanager
def replaced(model, given, act=gelu, gate_act=gelu, layers=(0, 1)):
    """Inside, the last linear of each MLP gives what the learners make of what the first one read."""
    handles, counts, read = [], [], {}
    modules = [
        (name, module) for name, module in linears(model).items() if "attn" not in name and "attention" not in name
    ]
    first = [module for name, module in modules if name.removesuffix(".weight").endswith(FIRST)]
    last = [module for name, module in modules if name.removesuffix(".weight").endswith(LAST)]
    assert len(first) == len(last) == 2
    for layer in layers:

        def keep(module, args, layer=layer):
            read[layer] = args[0]

        def give(module, args, out, layer=layer):
            return by_hand(given, layer, read[layer], act, gate_act, counts)

        handles += [first[layer].register_forward_pre_hook(keep), last[layer].register_forward_hook(give)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def compiled(model, recipe, **options):
    torch.compiler.reset()
    tokred.reset()
    given = {"recipe": recipe, "lower": "eager", "strict": True, **options}
    return torch.compile(model, backend="tokred", fullgraph=True, options=given)


def rows(graph=None):
    return [row for row in (graph or tokred.reports().graphs[0]).blocks if row.kind == "mlp"]


OTHERS = [name for name in MODELS if name != "llama"]


@pytest.mark.slow
@pytest.mark.parametrize("name, grad", [*((name, False) for name in OTHERS), ("llama", True), ("gpt2", True)])
def test_every_model_computes_the_definition(name, grad):
    model, inputs = made(name), example(name)
    given = weights(channels=model.config.hidden_size)
    with torch.no_grad(), replaced(model, given) as counts:
        wanted = run(model, inputs)
    assert len(set(counts)) > 2  # the gates of these weights choose several numbers
    assert (wanted - run(model, inputs)).abs().max() > 1e-3
    with torch.set_grad_enabled(grad):
        out = compiled(model, AdaptiveWidth(learners=given))(inputs)
    got = (out.logits if "logits" in out else out.last_hidden_state).detach()
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
    words = "0 to 3 learners of 5 neurons a token" + ", all computed and masked: no faster" * grad
    assert [row.note for row in rows()] == [words] * 2


OTHER_ACTIVATIONS = {"activation": "relu", "gate_activation": "silu", "layers": [1]}
MISFITS = {
    "learners of another layer": (
        AdaptiveWidth(learners=weights(layers=1), layers=[1]),
        "layer 1 has no learners; there are some for layers [0]",
    ),
    "learners of another width": (
        AdaptiveWidth(learners=weights(channels=16)),
        "layer 0's learners are for 16 channels, not 64",
    ),
}


def test_llama_computes_the_definition_in_all_ways(subtests):
    """Both layers; one with other activations; where there are learners; where they fit; with new weights."""
    torch.compiler.reset()
    model, inputs, given = made("llama"), example("llama"), weights()
    dense = run(model, inputs)
    methods = {
        "both": AdaptiveWidth(learners=given),
        "second": AdaptiveWidth(learners=given, **OTHER_ACTIVATIONS),
        "first": AdaptiveWidth(learners=weights(layers=1)),
    }
    loose = {name: {"recipe": method, "exact": False} for name, (method, _) in MISFITS.items()}
    ways = Ways({name: {"recipe": method, "strict": True} for name, method in methods.items()} | loose)
    fast = ways.compile(model)

    def check(**how):
        with replaced(model, given, **how) as counts:
            wanted = run(model, inputs)
        assert len(set(counts)) > 2 and (wanted - dense).abs().max() > 1e-3
        torch.testing.assert_close(run(fast, inputs), wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))

    with subtests.test("both"):
        check()
        assert [row.note for row in rows(ways.report)] == ["0 to 3 learners of 5 neurons a token"] * 2
    with subtests.test("activations and layers"):
        ways.way = "second"
        check(act=torch.relu, gate_act=silu, layers=(1,))
        assert [row.method is None for row in rows(ways.report)] == [True, False]
    with subtests.test("a layer without learners stays as it is"):
        ways.way = "first"
        check(layers=(0,))
        assert [row.method is None for row in rows(ways.report)] == [False, True]
    for ways.way, (_, reason) in MISFITS.items():
        with subtests.test(ways.way):
            assert torch.equal(run(fast, inputs), dense)
            refusal = next(row.refusal for row in rows(ways.report) if row.refusal)
            assert refusal.code == "method-raised" and refusal.reason.endswith(reason)
    with subtests.test("new weights of the model are seen"):
        ways.way = "both"
        model.load_state_dict({name: value * 1.1 + 0.01 for name, value in model.state_dict().items()})
        check()
        assert len(ways.reports["both"]) == 1


@pytest.mark.slow
def test_gradients_are_those_of_the_definition():
    model, inputs, given = made("llama"), example("llama"), weights()
    embedding = model.model.embed_tokens.weight
    with replaced(model, given):
        wanted = torch.autograd.grad(model(inputs).logits.square().mean(), embedding)
    found = compiled(model, AdaptiveWidth(learners=given), lower="aot_eager")(inputs).logits
    got = torch.autograd.grad(found.square().mean(), embedding)
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9 * float(wanted[0].abs().max()))


@pytest.mark.slow
def test_a_decoder_generates_as_defined_and_compiles_no_token_anew(tmp_path):
    from safetensors.torch import save_file

    given = weights(dtype=torch.float32)
    save_file(given, tmp_path / "learners.safetensors")
    model, ids = made("llama", torch.float32), example("llama")
    with replaced(model, given):
        wanted = generated(model, ids, tokens=8)
    torch.compiler.reset()
    tokred.reset()
    recipe = f"adaptive_width(learners={str(tmp_path / 'learners.safetensors')!r})"
    fast = tokred.compile(model, recipe, lower="aot_eager", fullgraph=True, strict=True)
    same(generated(fast, ids, tokens=8), wanted)
    assert len(tokred.reports().graphs) == 3  # prompt, first token, tokens behind a cache of run-time length


@pytest.mark.slow
def test_through_inductor():
    model, ids, given = made("llama", torch.float32), example("llama")[:1], weights(dtype=torch.float32)
    with replaced(model, given):
        wanted = run(model, ids)
    got = run(compiled(model, AdaptiveWidth(learners=given), lower="inductor"), ids)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


# -- refusals and bad input -------------------------------------------------------------------------------------------


def without(name):
    return {key: value for key, value in weights().items() if name not in key}


def other(name, value):
    return weights() | {f"model.layers.1.mlp.{name}": value}


BAD = [
    (None, r"learners=None\): a safetensors file or a dict"),
    ("nowhere.safetensors", r"learners='nowhere.safetensors'\): "),
    ({"layers.0.learners.up.weight": 3}, "a safetensors file or a dict"),
    ({}, r"learners=\{\.\.\.\}\): no learners in it"),
    ({"layers.0.router.weight": torch.ones(3)}, "no learners in it"),
    (without("gate.down.weight"), r"layer 0 lacks gate\.down\.weight"),
    (other("learners.up.weight", torch.ones(5, 32)), r"layer 1: learners\.up\.weight is \[5, 32\], not \[N F C\]"),
    (other("learners.down.weight", torch.ones(3, 5, 32)), r"learners\.down\.weight is \[3, 5, 32\], not \[3, 64, 5\]"),
    (other("learners.up.bias", torch.ones(15)), r"learners\.up\.bias is \[15\], not \[3, 5\]"),
    (other("gate.down.weight", torch.ones(3, 8)), r"gate\.down\.weight is \[3, 8\], not \[4, 8\], as its 3 learners"),
    (weights() | {"layers.0.gate.up.bias": torch.ones(8)}, r"layers\.0\.gate\.up\.bias is layer 0's second"),
]


@pytest.mark.parametrize(("given", "reason"), BAD)
def test_what_is_no_learner_is_said(given, reason):
    with pytest.raises(ArgumentError, match=reason):
        AdaptiveWidth(learners=given)


def test_other_arguments():
    with pytest.raises(ArgumentError, match=r"activation='tanh'\): one of gelu, relu, silu"):
        AdaptiveWidth(learners=weights(), activation="tanh")


def test_routed_experts_are_refused():
    model = MixtralForCausalLM(MixtralConfig(**TWO | {"num_hidden_layers": 1, "num_local_experts": 4})).eval()
    run(compiled(model, AdaptiveWidth(learners=weights()), strict=False), example("llama"))
    assert [row.refusal.code for row in rows()] == ["layout"]


# -- the operator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[0], [3], [0, 0, 0], [3, 3], [1, 3, 0, 2, 2, 0, 1]])
def test_rows_are_sorted_or_masked_with_the_same_result(counts, dtype):
    torch.manual_seed(0)
    x = torch.randn(len(counts), 7).to(dtype)
    parts = [torch.randn(size).to(dtype) for size in ((3, 4, 7), (3, 4), (3, 4, 7), (3, 7))]
    count = torch.tensor(counts)
    wanted = torch.zeros(len(counts), 7, dtype=torch.float64)
    up, up_bias, down, down_bias = (part.double() for part in parts)
    for row, number in enumerate(counts):
        for n in range(number):
            wanted[row] += gelu(up[n] @ x[row].double() + up_bias[n]) @ down[n] + down_bias[n]
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype] * float(wanted.abs().max() + 1)
    for function in (masked_learners, nested_learners):
        torch.testing.assert_close(function(x, count, *parts, "gelu").double(), wanted, rtol=0, atol=bound)


def test_the_operator_keeps_torch_s_rules():
    parts = [torch.randn(size) for size in ((3, 4, 7), (3, 4), (3, 4, 7), (3, 7))]
    torch.library.opcheck(nested_learners, (torch.randn(5, 7), torch.tensor([0, 3, 1, 2, 2]), *parts, "relu"))


def test_no_rows_at_all():
    parts = [nn.Parameter(torch.randn(size)).detach() for size in ((3, 4, 7), (3, 4), (3, 4, 7), (3, 7))]
    empty = torch.zeros(0, dtype=torch.long)
    assert nested_learners(torch.randn(0, 7), empty, *parts, "relu").shape == (0, 7)
