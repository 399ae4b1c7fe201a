"""Checks of a method in whole models: two small ones of this file, or the caller's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_leaves

from tokred.compiler.extras import with_extras
from tokred.compiler.options import parse_options
from tokred.compiler.pipeline import Compiled, transform
from tokred.registry.method import Method, Reduction

__all__ = ["Run", "TinyDecoder", "TinyPrompt", "TinyText", "TinyViT", "Traced", "check_model", "compiled"]

WIDTH, HEADS, BLOCKS = 32, 4, 3
# Of Dynamo: one code may be compiled for any number of methods, and no size is dynamic because another was seen before.
UNLIMITED = {"recompile_limit": 1 << 16, "accumulated_recompile_limit": 1 << 16, "automatic_dynamic_shapes": False}


class Block(nn.Module):
    """Attention and an MLP, norms first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [B H N D]
        attended = scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, WIDTH))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class TinyViT(nn.Module):
    """A class token and 6 x 6 patches. [B 3 12 12] -> logits [B 5] and tokens [B 37 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.first, self.places = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 37, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return {"logits": self.head(x[:, 0]), "tokens": x}


class TinyText(nn.Module):
    """Text with padding, classified by its first token. ids, valid [B 21] -> logits [B 5] and tokens [B 21 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, WIDTH), nn.Parameter(torch.randn(1, 21, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, ids: Tensor, valid: Tensor) -> dict[str, Tensor]:
        x = self.words(ids) + self.places
        for block in self.blocks:
            x = block(x, valid[:, None, None, :])
        x = self.norm(x)
        return {"logits": self.head(x[:, 0]), "tokens": x}


class TinyPrompt(nn.Module):
    """A prompt with the tokens of an image in it. ids [B 21] with nine zeros, pixels [B 3 6 6] -> logits [B 21 50]."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, WIDTH), nn.Parameter(torch.randn(1, 21, WIDTH))
        self.patch, self.first = nn.Conv2d(3, WIDTH, 2, stride=2), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.eye, self.project = Block(), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        assert ids.shape[0] == pixels.shape[0], "one image for each prompt"
        words, patches = self.words(ids), self.patch(pixels).flatten(2).transpose(1, 2)
        seen = self.eye(torch.cat([self.first.expand(patches.shape[0], -1, -1), patches], 1))
        features = self.project(seen[:, 1:])
        x = words.masked_scatter((ids == 0).unsqueeze(-1).expand_as(words), features) + self.places
        places = torch.arange(ids.shape[1], device=ids.device)
        causal = (places <= places.unsqueeze(-1))[None, None]
        for block in self.blocks:
            x = block(x, causal)
        logits: Tensor = self.norm(x) @ self.words.weight.t()
        return logits


class CausalBlock(Block):
    """Two query heads share a key head, and no token sees a later one."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1, :, : HEADS // 2], qkv[2, :, : HEADS // 2]
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, WIDTH))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class TinyDecoder(nn.Module):
    """A language model for texts of any length. ids [B N] -> logits [B N 50]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(CausalBlock() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.norm(x) @ self.words.weight.t()
        return logits


@dataclass
class Run:
    """What tokred did with each graph of a model that `compiled` made, in the order of compilation."""

    graphs: list[Compiled] = field(default_factory=list)
    fixed: bool = False  # what was done holds for some of the sizes that the trace left open

    @property
    def applied(self) -> list[Any]:
        return [applied for graph in self.graphs for applied in graph.applied]

    @property
    def layers(self) -> list[int]:
        """The layers at which anything acted."""
        return [applied.place.layer for applied in self.applied] + [
            block.layer for graph in self.graphs for block in graph.rewritten
        ]

    @property
    def refusals(self) -> list[str]:
        reports = [graph.report for graph in self.graphs]
        refused = [f"{b.refusal.code}: {b.refusal.reason}" for report in reports for b in report.blocks if b.refusal]
        return refused + [note for report in reports for note in report.notes]


class Traced:
    """A model that Dynamo and the capture, which know no method, see once; any number of methods follow, one by one.

    A method that sets `Run.fixed` must be the last: Dynamo looked at its guards when it had traced for the first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._function = torch.compile(model, backend=self._compile)
        self._numbers = count()

    def under(self, method: Method) -> tuple[Callable[..., Any], Run]:
        """The model with the method in it, run by eager PyTorch, without the exact passes."""
        options = parse_options({"recipe": method, "exact": False, "lower": "eager"})
        run, made = Run(), dict[int, Callable[..., Any]]()

        def call(*args: Any) -> Any:
            self._now = options, run, made
            with torch._dynamo.config.patch(UNLIMITED):
                return self._function(*args)

        return call, run

    def _compile(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured: list[fx.GraphModule] = []
        number, mode = next(self._numbers), detect_fake_mode(inputs)
        sizes = mode.shape_env if mode is not None else None
        guards = 0

        def observe(stage: str, graph: fx.GraphModule) -> None:
            nonlocal guards
            if stage == "captured":
                captured[:], guards = [graph], len(sizes.guards) if sizes is not None else 0

        def function() -> Callable[..., Any]:
            options, run, made = self._now
            if number not in made:
                done = transform(gm, inputs, options, observe, captured=captured[0] if captured else None)
                run.graphs.append(done)
                run.fixed |= sizes is not None and len(sizes.guards) > guards
                graph = done.graph if done.changed else gm
                made[number] = with_extras(graph, graph, done.extras, done.own)
            return made[number]

        function()  # what the capture needs of Dynamo's graph is gone when Dynamo is done
        return lambda *args: function()(*args)


def compiled(model: nn.Module, method: Method) -> tuple[Callable[..., Any], Run]:
    """The model with the method in it, run by eager PyTorch, without the exact passes."""
    return Traced(model).under(method)


def check_model(method: Method, idle: Method, traced: Traced, inputs: tuple[Any, ...]) -> Run:
    """Nothing removed: bitwise the model. Otherwise right shapes and counts, twice the same, finite gradients."""
    model = traced.model
    where = f"{method} in {type(model).__name__}"
    idling, nothing = traced.under(idle)
    function, run = traced.under(method)
    expected = model(*inputs)
    for plain, got in zip(_leaves(expected), _leaves(idling(*inputs)), strict=True):
        assert torch.equal(plain, got), f"{where}: with nothing removed ({idle}) the output is not bitwise the model's"
    assert not nothing.layers, f"{where}: {idle} must remove nothing, but acts at layers {nothing.layers}"
    outputs = _leaves(function(*inputs))
    for plain, got in zip(_leaves(expected), outputs, strict=True):
        _same_form(where, plain, got)
    for one, two in zip(outputs, _leaves(function(*inputs)), strict=True):
        assert torch.equal(one, two), f"{where}: two runs on the same input differ"
    if isinstance(method, Reduction):
        _check_counts(where, method, run)
    _check_gradients(where, model, outputs)
    return run


def check_dynamic(method: Method, traced: Traced, batches: list[tuple[Tensor, ...]], *, alone: bool) -> bool:
    """One graph serves batches of several sizes. `alone`, the method is the first of this trace.

    If not: whether the trace was of use. If the method fixes a size, it is not, and must be checked alone.
    """
    model = traced.model
    function, run = traced.under(method)
    with torch.no_grad():
        for inputs in batches:
            for tensor in inputs:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            outputs = _leaves(function(*inputs))
            if run.fixed and not alone:
                return False
            where = f"{method} in {type(model).__name__}, dynamic batch of {inputs[0].shape[0]}"
            for plain, got in zip(_leaves(model(*inputs)), outputs, strict=True):
                _same_form(where, plain, got)
    assert len(run.graphs) == 1, f"{method}: {len(run.graphs)} graphs for {len(batches)} batch sizes, not one"
    assert run.layers, f"{method}: refused where the batch size is dynamic: {run.refusals}"
    return True


def check_type(method: Method, traced: Traced, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """One sample, in the floating-point type of the model."""
    inputs = tuple(x[:1].to(dtype) if x.is_floating_point() else x[:1] for x in inputs)
    function, run = traced.under(method)
    with torch.no_grad():
        for plain, got in zip(_leaves(traced.model(*inputs)), _leaves(function(*inputs)), strict=True):
            _same_form(f"{method} in {type(traced.model).__name__}, one sample, {dtype}", plain, got)
    assert run.layers, f"{method}: refused in {dtype}: {run.refusals}"


def _same_form(where: str, plain: Tensor, got: Tensor) -> None:
    assert plain.shape == got.shape, f"{where}: the output has shape {list(got.shape)}, the model's {list(plain.shape)}"
    assert plain.dtype == got.dtype, f"{where}: the output is {got.dtype}, the model's {plain.dtype}"
    assert got.isfinite().all(), f"{where}: the output is not finite"


def _check_counts(where: str, method: Reduction, run: Run) -> None:
    for applied in run.applied:
        promised = applied.place.tokens - method.removed(applied.place)
        assert applied.after == promised, (
            f"{where}: layer {applied.place.layer} has {applied.after} tokens left, removed() promises {promised}"
        )


def _check_gradients(where: str, model: nn.Module, outputs: list[Tensor]) -> None:
    loss = sum((value.square().mean() for value in outputs if value.requires_grad), torch.zeros(()))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        return
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        assert gradient is None or gradient.isfinite().all(), f"{where}: the gradient of {name} is not finite"
    assert any(g is not None and g.any() for g in gradients), f"{where}: no parameter has a gradient"


def _leaves(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
