"""Time the prefill of a decoder shaped like a small LLaVA, interleaved in one process.

    python -m benchmarks.decoder --recipe "fastv(layer=2, keep=0.5)" --batch 1 --dtype float32

    eager       the unmodified model: a Llama, a prompt of 640 tokens of which 576 stand for an image, the last logits
    inductor    torch.compile(model, backend="inductor")
    ideal       the model's own layers, written out, with the recipe's token counts, a slice for a cut, and one row in
                the last layer; "inductor"
    exact       backend="tokred", no recipe: the exact passes alone
    free        tokred.compile, the recipe with the first rows instead of the best
    method      tokred.compile, the recipe, the defaults

The selection costs what `method` takes beyond `free`. Without --recipe only eager, inductor and exact run. --whole
takes the last of all logits instead of asking the model for one row of them. All variants make and return caches.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from benchmarks.compare import Forward, Result, measure, relative, report, warm_up
from benchmarks.machine import describe
from tests.zoo.torchvision_shim import install
from tokred.registry.maps import Keep
from tokred.registry.recipe import parse_recipe

VISUAL, LENGTH, WORDS = (35, 611), 640, 1000  # LLaVA's prompt: a system prompt, 24 x 24 patches, a question
VARIANTS = ("eager", "inductor", "ideal", "exact", "free", "method")
REFERENCE = {"inductor": "eager", "exact": "eager", "free": "ideal"}  # who must give the same numbers
Cuts = dict[int, int]  # layer -> how many tokens enter it


def build(layers: int, width: int, length: int = LENGTH) -> Any:
    """A Llama with random weights, heads of 64 channels and an MLP 8/3 as wide as the stream."""
    install()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 2),
        max_position_embeddings=length,
    )
    model: Any = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # as they are initialised, attention is nearly the same everywhere
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


class Last(nn.Module):
    """[B N] -> [B V], the last logits; the caches go to whoever asks."""

    def __init__(self, model: Any, whole: bool):
        super().__init__()
        self.model, self.only = model, {} if whole else {"logits_to_keep": 1}

    def forward(self, ids: Tensor) -> Any:
        output = self.model(ids, use_cache=True, **self.only)
        return output.logits[:, -1], [(layer.keys, layer.values) for layer in output.past_key_values.layers]


class Ideal(nn.Module):
    """The model's own layers on fewer tokens: in front of a layer of `cuts` the last visual rows are sliced away.

    As only the last logits are read, the last layer has one query, and one row in its MLP.
    """

    def __init__(self, model: Any, cuts: Cuts, text: int):
        super().__init__()
        self.model, self.cuts, self.text = model, cuts, text  # `text` rows behind the image always stay

    def forward(self, ids: Tensor) -> Any:
        from transformers import DynamicCache

        inner, cache = self.model.model, DynamicCache()
        hidden = inner.embed_tokens(ids)  # [B N C]
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        rotary = inner.rotary_emb(hidden, position_ids=positions)
        for number, layer in enumerate(inner.layers):
            if number in self.cuts:
                front = self.cuts[number] - self.text
                hidden, *rotary = (torch.cat([x[:, :front], x[:, -self.text :]], 1) for x in (hidden, *rotary))
            if number + 1 < len(inner.layers):
                hidden = layer(hidden, attention_mask=None, position_embeddings=tuple(rotary), past_key_values=cache)
        logits = self.model.lm_head(inner.norm(self.last(hidden, rotary, cache)))[:, -1]
        return logits, [(layer.keys, layer.values) for layer in cache.layers]

    def last(self, hidden: Tensor, rotary: list[Tensor], cache: Any) -> Tensor:
        """[B N C] -> [B 1 C], the last row behind the last layer."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [B N C] -> [B H N D]

        layer = self.model.model.layers[-1]
        attention, rows = layer.self_attn, layer.input_layernorm(hidden)
        query, key, value = attention.q_proj(rows[:, -1:]), attention.k_proj(rows), attention.v_proj(rows)
        key, _ = apply_rotary_pos_emb(heads(key), heads(key), *rotary)
        query, _ = apply_rotary_pos_emb(heads(query), heads(query), *(table[:, -1:] for table in rotary))
        key, value = cache.update(key, heads(value), attention.layer_idx)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        one = hidden[:, -1:] + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        result: Tensor = one + layer.mlp(layer.post_attention_layernorm(one))
        return result


def free(recipe: str) -> list[Any]:
    """The recipe's methods with the first rows instead of the best: what a cut costs when choosing costs nothing."""

    def plan(self: Any, site: Any) -> Keep:
        return Keep(site.with_protected(site.arange(site.head, site.tokens - site.tail - self.removed(site))))

    def blind(method: Any) -> Any:
        options = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
        return type("Free", (type(method),), {"plan": plan, "needs": ("visual",)})(**options)

    return [blind(method) for method in parse_recipe(recipe).methods]


def compiled(model: Any, whole: bool, recipe: Any, visual: tuple[int, int], **options: Any) -> Forward:
    fast = tokred.compile(model, recipe, spans={"visual": visual}, dynamic=False, **options)
    caller = Last(model, whole)
    caller.model = fast
    return caller


def cuts_of(model: Any, ids: Tensor, recipe: str, visual: tuple[int, int]) -> Cuts:
    """How many tokens enter each layer in front of which the recipe cuts."""
    torch._dynamo.reset()
    tokred.reset()
    with torch.no_grad():
        compiled(model, False, recipe, visual, lower="eager")(ids)
    blocks = [block for graph in tokred.reports().graphs for block in graph.blocks if block.method]
    refused = [block.refusal.reason for block in blocks if block.refusal]
    if refused or not blocks:
        raise SystemExit(f"{recipe} does not act: {refused or 'no site'}")
    return {block.layer: int(block.tokens[1]) for block in blocks}


def variants(
    model: Any, untouched: Any, recipe: str | None, whole: bool, cuts: Cuts, visual: tuple[int, int], length: int
) -> dict[str, Callable[[], Forward]]:
    """How to make each variant. `untouched` is the model again, which tokred.compile never sees.

    It leaves transformers' hooks in a model's layers. An ideal that calls those itself would be traced in pieces.
    """
    plain = Last(untouched, whole)
    ideal = Ideal(untouched, cuts, length - visual[1])
    made: dict[str, Callable[[], Forward]] = {
        "eager": lambda: plain,
        "inductor": lambda: torch.compile(plain, backend="inductor", dynamic=False),
        "exact": lambda: torch.compile(plain, backend="tokred", dynamic=False),
    }
    if recipe is not None:
        make = partial(compiled, model, whole)
        made |= {
            "ideal": lambda: torch.compile(ideal, backend="inductor", dynamic=False, fullgraph=True),
            "free": lambda: make(free(recipe), visual),
            "method": lambda: make(recipe, visual),
        }
    return {name: made[name] for name in VARIANTS if name in made}


def logits(function: Forward) -> Forward:
    return lambda ids: function(ids)[0]  # type: ignore[no-any-return]


def validate(model: Any, made: dict[str, Callable[[], Forward]], ids: Tensor, options: Any, result: Result) -> None:
    """float64: the layers written out are the model, their cuts are tokred's, the exact passes change nothing."""
    whole, visual = options.whole, scaled(options.length)
    eager = logits(made["eager"]())
    pairs = {"exact == model": (torch.compile(eager, backend="tokred", options={"lower": "eager"})(ids), eager(ids))}
    if options.recipe is not None:
        text = options.length - visual[1]
        cuts = cuts_of(model, ids, options.recipe, visual)
        picked = compiled(model, whole, free(options.recipe), visual, lower="eager")
        pairs |= {
            "ideal without cuts == model": (Ideal(model, {}, text)(ids)[0], eager(ids)),
            "ideal == free": (Ideal(model, cuts, text)(ids)[0], logits(picked)(ids)),
        }
    for check, (got, want) in pairs.items():
        result.checks[check] = worst = relative(got, want)
        if not worst <= 1e-9:
            raise SystemExit(f"{check}: differs by {worst:.1e} in float64 (allowed 1e-9); nothing was timed")


def scaled(length: int) -> tuple[int, int]:
    """Where the image is in a prompt of another length."""
    return VISUAL[0] * length // LENGTH, VISUAL[1] * length // LENGTH


def run(options: Any) -> Result:
    dtype = getattr(torch, options.dtype)
    result = Result(f"llama, {options.layers} layers", options.batch, 0, options.dtype, describe())
    result.recipe = options.recipe or "no recipe"
    visual = scaled(options.length)
    ids = torch.randint(0, WORDS, (options.batch, options.length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model, untouched = (build(options.layers, options.width, options.length).double() for _ in range(2))
        cuts: Cuts = {}
        if options.recipe is not None:
            cuts = cuts_of(model, ids[:1], options.recipe, visual)
        make = partial(variants, model, untouched, options.recipe, options.whole, cuts, visual, options.length)
        validate(model, make(), ids[:1], options, result)
        torch._dynamo.reset()
        model.to(dtype), untouched.to(dtype)
        wanted = {name: logits(one()) for name, one in make().items() if name in options.variants}
        warm_up(wanted, ids, result, REFERENCE, dtype)
        measure(wanted, ids, options.rounds, result)
    return result


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoder", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--recipe")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--whole", action="store_true", help="take the last of all logits")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="also write everything, every sample included, to this file")
    options = parser.parse_args(arguments)
    result = run(options)
    report(result, options.json)
    if (share := result.selection()) is not None:
        print(f"choosing takes {100 * share:.1f} % of the prefill")
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
