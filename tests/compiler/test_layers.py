"""Which blocks make a layer, where it ends, and that it runs by itself as it does in the graph."""

import pytest
import torch
from torch import fx, nn

from tokred.compiler.axes import Axes
from tokred.compiler.blocks import find_blocks
from tokred.compiler.capture import capture
from tokred.compiler.layers import find_layers
from tokred.compiler.neurons import find_neurons

WIDTH = 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, memory=None):
        x = self.norm(x)
        memory = x if memory is None else memory
        q, k, v = (linear(value).unsqueeze(1) for linear, value in ((self.q, x), (self.k, memory), (self.v, memory)))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


class Blocks(nn.Module):
    """Layers of a self-attention, in some of a cross-attention, and of an MLP: one after another, or side by side."""

    def __init__(self, form, layers=2):
        super().__init__()
        self.form = form
        self.attentions, self.crosses = (nn.ModuleList(Attention() for _ in range(layers)) for _ in range(2))
        self.mlps = nn.ModuleList(Mlp() for _ in range(layers))

    def forward(self, x, memory):
        for attention, cross, mlp in zip(self.attentions, self.crosses, self.mlps, strict=True):
            if self.form == "x + attention + mlp":
                x = x + attention(x) + mlp(x)
            elif self.form == "attention + mlp + x":
                x = attention(x) + mlp(x) + x
            elif self.form == "attention alone":
                x = x + attention(x)
            else:
                x = x + attention(x)
                x = x + cross(x, memory) if self.form == "cross" else x
                x = x + mlp(x)
        return x


FORMS = {
    "sequence": ["qkv", "out", "up", "down"],
    "x + attention + mlp": ["qkv", "out", "up", "down"],
    "attention + mlp + x": ["qkv", "out", "up", "down"],
    "cross": ["qkv", "out", "qkv", "qkv", "out", "up", "down"],
    "attention alone": ["qkv", "out"],
}


def captured(model, *inputs):
    kept = []

    def backend(gm, example_inputs):
        kept.append((capture(gm, example_inputs), example_inputs))
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False)(*inputs)
    (found,) = kept
    return found


class Values(fx.Interpreter):
    def __init__(self, gm):
        super().__init__(gm, garbage_collect_values=False)

    def of(self, inputs):
        self.run(*inputs)
        return self.env


@pytest.mark.parametrize("form", FORMS)
def test_layers_end_on_the_stream_and_run_by_themselves(form):
    torch.manual_seed(0)
    model = Blocks(form).double().eval()
    x, memory = torch.randn(2, 5, WIDTH).double(), torch.randn(2, 3, WIDTH).double()
    gm, inputs = captured(model, x, memory)
    layers = find_layers(find_neurons(gm, find_blocks(gm, Axes(gm.graph))))
    assert [[site.place.role for site in layer.sites] for layer in layers] == [FORMS[form]] * 2
    values = Values(gm).of(inputs)
    with torch.no_grad():
        streams = [Blocks.forward(first_of(model, number), x, memory) for number in (1, 2)]
        for layer, stream in zip(layers, streams, strict=True):
            torch.testing.assert_close(values[layer.output], stream, rtol=1e-12, atol=1e-12)
            known = {node: values[node] for node in layer.needed}
            torch.testing.assert_close(layer.run(known, {}), stream, rtol=1e-12, atol=1e-12)
            for site in layer.sites:
                changed = layer.run(known, {site: lambda read: read * 0.5})
                assert (changed - stream).abs().max() > 1e-3


def first_of(model, number):
    short = Blocks(model.form, number).double().eval()
    short.load_state_dict({name: value for name, value in model.state_dict().items() if name in short.state_dict()})
    return short


def test_a_mask_reaches_the_linears_of_its_site_alone():
    torch.manual_seed(0)
    model, x = Blocks("sequence", 1).double().eval(), torch.randn(2, 5, WIDTH).double()
    gm, inputs = captured(model, x, x)
    (layer,) = find_layers(find_neurons(gm, find_blocks(gm, Axes(gm.graph))))
    values = Values(gm).of(inputs)
    known = {node: values[node] for node in layer.needed}
    down = next(site for site in layer.sites if site.place.role == "down")
    mlp = model.mlps[0]
    with torch.no_grad():
        between = x + model.attentions[0](x)
        wanted = between + mlp.down(0.5 * nn.functional.gelu(mlp.up(mlp.norm(between))))
        torch.testing.assert_close(layer.run(known, {down: lambda read: 0.5 * read}), wanted, rtol=1e-12, atol=1e-12)
