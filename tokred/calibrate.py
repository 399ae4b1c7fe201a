"""`tokred.calibrate`: run a model on sample data and keep what sparse methods take their thresholds from."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from tokred.compiler.axes import Axes
from tokred.compiler.blocks import find_blocks
from tokred.compiler.calibration import Calibration, Fingerprint, Measured
from tokred.compiler.capture import capture
from tokred.compiler.layers import Layer, find_layers
from tokred.compiler.neurons import NeuronSite, find_neurons
from tokred.errors import CalibrationError
from tokred.explain import as_compiled
from tokred.passes.expand_encoder_layer import expand_encoder_layer
from tokred.registry.allocation import greedy_shares
from tokred.registry.neurons import Sparsity, masked_by
from tokred.registry.recipe import parse_recipe
from tokred.registry.sketch import Sketch

__all__ = ["calibrate"]

log = logging.getLogger("tokred")

Names = tuple[str, ...]  # of the parameters of the linears that read one value


def calibrate(
    model: torch.nn.Module, batches: Iterable[Any], *, recipe: Any = None, progress: bool = True
) -> Calibration:
    """Measure, on sample data, what the sparse methods of a recipe need to know of a model.

    model     in eval mode; it is not changed, and runs uncompiled, without gradients
    batches   each a mapping of keyword arguments, a tuple or list of arguments, or one argument. Tokens that a
              two-dimensional `attention_mask` [B N] among them marks as padding do not count. Batches of few different
              shapes are quickest: each shape is traced once
    recipe    which methods are to be served (whatever their sparsity); None measures for all of them
    progress  whether to show how far it is

    One calibration serves every sparsity. Where a method of the recipe wants shares allocated, as
    "teal(allocation='greedy')" does, each layer is then run some hundred times by itself on what entered it, and the
    whole model once for each layer: few batches are enough. Under torch.distributed, give each process its own batches
    and call `all_merge()` on the result: counts add up; of allocations it takes the mean.
    Raises CalibrationError where there is nothing to measure, or where it is no number.
    """
    if model.training:
        raise CalibrationError(
            "calibrate: the model is in training mode, and dropout would be measured; use model.eval()"
        )
    wanted = _wanted(recipe)
    plain: Any = getattr(model, "_orig_mod", model)
    names = {id(parameter): name for name, parameter in plain.named_parameters(remove_duplicate=True)}
    meter = _Meter(wanted, names)
    limits: dict[str, Any] = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), 1 << 16)
    allocating = any(method.allocated for method in parse_recipe(recipe).of(Sparsity))
    batches = list(batches) if allocating else batches
    with torch.no_grad(), torch._dynamo.config.patch(limits), as_compiled(plain):
        compiled: Any = torch.compile(plain, backend=meter.backend, dynamic=False)
        meter.run(compiled, _shown(batches, progress))
        found = meter.calibration(type(plain).__name__)
        if not found.sites:
            measured = "/".join(sorted(wanted))
            raise CalibrationError(
                f"{type(plain).__name__} has no linear layers of MLPs or attentions to measure: {measured}"
            )
        found.check()
        if allocating:
            for layer in _shown(meter.layers(), progress, "allocate"):
                meter.keeping, meter.kept = layer, []
                meter.run(compiled, batches)
                _allocate(meter, {site.parameters: site for site in found.sites if site.values == "input"})
    return found


def _wanted(recipe: Any) -> set[str]:
    """Which values the recipe's methods ask for."""
    methods = parse_recipe(recipe).of(Sparsity)
    if recipe is None:
        return {"gate", "input"}
    roles = {role for method in methods if method.calibrated for role in method.acts_at}
    if not roles:
        raise CalibrationError(f"no method of the recipe {str(parse_recipe(recipe))!r} needs a calibration")
    return {"gate" if role == "gate" else "input" for role in roles}


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _shown(parts: Iterable[Any], progress: bool, what: str = "calibrate") -> Iterable[Any]:
    """Batches or layers, with a progress bar if tqdm is there, else with a line in the log for each."""
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            return tqdm(parts, desc=what, disable=None)  # type: ignore[no-any-return]
    return _logged(parts, what)


def _logged(parts: Iterable[Any], what: str) -> Iterable[Any]:
    total = f" of {len(parts)}" if isinstance(parts, Sized) else ""
    for number, part in enumerate(parts, 1):
        log.info("%s: %s %d%s", what, "batch" if what == "calibrate" else "layer", number, total)
        yield part


@dataclass(frozen=True)
class _Kept:
    """What one run of a layer needs and gave, and which of its tokens [B N] are no padding."""

    layer: Layer
    names: dict[NeuronSite, Names]
    known: dict[fx.Node, Any]
    output: Tensor
    real: Tensor | None


class _Meter:
    """A Dynamo backend whose graphs count the magnitudes of some values while they run.

    keeping, kept   the layer whose runs are kept instead, by its sites' parameters, and these
    """

    def __init__(self, wanted: set[str], names: dict[int, str]):
        self.wanted, self.names = wanted, names
        self.real: Tensor | None = None  # [B N] the tokens of the present batch that are no padding
        self.fingerprints: dict[str, Fingerprint] = {}
        self.sketches: dict[tuple[str, Names], Sketch] = {}
        self.bytes: dict[Names, int] = {}  # of the parameters together
        self.found: dict[tuple[Names, ...], None] = {}  # layers, in their order
        self.keeping: tuple[Names, ...] | None = None
        self.kept: list[_Kept] = []

    def run(self, compiled: Any, batches: Iterable[Any]) -> None:
        for batch in batches:
            args, kwargs = _arguments(batch)
            mask = kwargs.get("attention_mask")
            self.real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
            compiled(*args, **kwargs)

    def backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        captured = expand_encoder_layer(capture(gm, example_inputs))
        parameters = {
            node: value
            for node, value in zip(captured.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
            if isinstance(value, Tensor)
        }
        watched: dict[fx.Node, list[Sketch]] = {}
        named: dict[NeuronSite, Names] = {}
        for site in find_neurons(captured, find_blocks(captured, Axes(captured.graph))):
            if site.measured in self.wanted and (names := self._named(captured, site, parameters)):
                watched.setdefault(site.values, []).append(self.sketches.setdefault((site.measured, names), Sketch()))
                if site.measured == "input":
                    named[site] = names
        layers = find_layers(named)
        self.found.update(dict.fromkeys(tuple(named[site] for site in layer.sites) for layer in layers))
        return _Watching(captured, watched, layers, named, self).run

    def _named(self, gm: fx.GraphModule, site: NeuronSite, parameters: dict[fx.Node, Tensor]) -> Names:
        """The names that the parameters of the site's linears have in the model."""
        names, size = [], 0
        for linear in site.linears:
            if linear.weight is None:
                continue
            value = parameters[linear.weight] if linear.weight in parameters else getattr(gm, str(linear.weight.target))
            name = self.names.get(id(value), linear.name)
            self.fingerprints[name] = Fingerprint.of(value)
            names.append(name)
            size += value.nbytes
        self.bytes[tuple(names)] = size
        return tuple(names)

    def layers(self) -> list[tuple[Names, ...]]:
        """The layers by their sites' parameters, without those that share some but not all of these with another."""
        of = Counter(names for layer in self.found for names in set(layer))
        return [layer for layer in self.found if all(of[names] == 1 for names in layer)]

    def calibration(self, model: str) -> Calibration:
        sites = [Measured(values, names, sketch) for (values, names), sketch in self.sketches.items()]
        return Calibration(model, self.fingerprints, sites)


class _Watching(fx.Interpreter):
    """Run a graph, and count the magnitudes of the watched values as they come; or keep what a layer needs."""

    def __init__(
        self,
        gm: fx.GraphModule,
        watched: dict[fx.Node, list[Sketch]],
        layers: list[Layer],
        named: dict[NeuronSite, Names],
        meter: _Meter,
    ):
        super().__init__(gm)
        self.watched, self.layers, self.named, self.meter = watched, layers, named, meter
        self.known: dict[fx.Node, Any] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        meter = self.meter
        layers = [layer for layer in self.layers if tuple(self.named[site] for site in layer.sites) == meter.keeping]
        wanted = {node for layer in layers for node in (*layer.needed, layer.output)}
        self.known = dict.fromkeys(wanted)
        result = super().run(*args, **kwargs)
        for layer in layers:
            known = {node: self.known[node] for node in layer.needed}
            meter.kept.append(_Kept(layer, self.named, known, self.known[layer.output], meter.real))
        self.known = {}
        return result

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.known:
            self.known[n] = value
        if self.meter.keeping is None:
            for sketch in self.watched.get(n, ()):
                sketch.add(_real(value, self.meter.real))
        return value


def _allocate(meter: _Meter, sites: dict[Names, Measured]) -> None:
    """Give the sites of the layer that was kept their shares."""
    assert meter.keeping is not None
    layer = dict.fromkeys(meter.keeping)  # a site that a layer has twice is one

    def error(shares: list[float]) -> float:
        given = zip(layer, shares, strict=True)
        limits = {names: sites[names].sketch.threshold(share) for names, share in given if share}
        total = 0.0
        for kept in meter.kept:
            masks = {
                site: partial(masked_by, threshold=limits[names])
                for site in kept.layer.sites
                if (names := kept.names[site]) in limits
            }
            change = kept.layer.run(kept.known, masks) - kept.output
            total += float(_real(change, kept.real).double().square().sum())
        return total

    for names, shares in zip(layer, greedy_shares(error, [meter.bytes[names] for names in layer]), strict=True):
        sites[names].shares = tuple(shares)


def _real(values: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of values [B N F] or [B*N F] that are no padding; all of them where the mask [B N] is of other rows."""
    if mask is not None and values.shape[:2] == mask.shape:
        return values[mask.to(values.device)]
    if mask is not None and values.dim() == 2 and values.shape[0] == mask.numel():
        return values[mask.flatten().to(values.device)]
    return values
