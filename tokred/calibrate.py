"""`tokred.calibrate`: run a model on sample data and keep what sparse methods take their thresholds from."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, fx

from tokred.compiler.axes import Axes
from tokred.compiler.blocks import find_blocks
from tokred.compiler.calibration import Calibration, Fingerprint, Measured
from tokred.compiler.capture import capture
from tokred.compiler.neurons import NeuronSite, find_neurons
from tokred.errors import CalibrationError
from tokred.explain import as_compiled
from tokred.passes.expand_encoder_layer import expand_encoder_layer
from tokred.registry.neurons import Sparsity
from tokred.registry.recipe import parse_recipe
from tokred.registry.sketch import Sketch

__all__ = ["calibrate"]

log = logging.getLogger("tokred")


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

    One calibration serves every sparsity. Under torch.distributed, give each process its own batches and call
    `all_merge()` on the result. Raises CalibrationError where there is nothing to measure, or where it is no number.
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
    with torch.no_grad(), torch._dynamo.config.patch(limits), as_compiled(plain):
        compiled: Any = torch.compile(plain, backend=meter.backend, dynamic=False)
        for batch in _shown(batches, progress):
            args, kwargs = _arguments(batch)
            mask = kwargs.get("attention_mask")
            meter.real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
            compiled(*args, **kwargs)
    found = meter.calibration(type(plain).__name__)
    if not found.sites:
        measured = "/".join(sorted(wanted))
        raise CalibrationError(
            f"{type(plain).__name__} has no linear layers of MLPs or attentions to measure: {measured}"
        )
    found.check()
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


def _shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    """The batches, with a progress bar if tqdm is there, else with a line in the log for each."""
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            return tqdm(batches, desc="calibrate", disable=None)  # type: ignore[no-any-return]
    return _logged(batches)


def _logged(batches: Iterable[Any]) -> Iterable[Any]:
    total = f" of {len(batches)}" if isinstance(batches, Sized) else ""
    for number, batch in enumerate(batches, 1):
        log.info("calibrate: batch %d%s", number, total)
        yield batch


class _Meter:
    """A Dynamo backend whose graphs count the magnitudes of some values while they run."""

    def __init__(self, wanted: set[str], names: dict[int, str]):
        self.wanted, self.names = wanted, names
        self.real: Tensor | None = None  # [B N] the tokens of the present batch that are no padding
        self.fingerprints: dict[str, Fingerprint] = {}
        self.sketches: dict[tuple[str, tuple[str, ...]], Sketch] = {}

    def backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        captured = expand_encoder_layer(capture(gm, example_inputs))
        parameters = {
            node: value
            for node, value in zip(captured.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
            if isinstance(value, Tensor)
        }
        watched: dict[fx.Node, list[Sketch]] = {}
        for site in find_neurons(captured, find_blocks(captured, Axes(captured.graph))):
            if site.measured in self.wanted and (sketch := self._sketch(captured, site, parameters)) is not None:
                watched.setdefault(site.values, []).append(sketch)
        return _Watching(captured, watched, self).run

    def _sketch(self, gm: fx.GraphModule, site: NeuronSite, parameters: dict[fx.Node, Tensor]) -> Sketch | None:
        """Where the site's magnitudes are counted, under its parameters' names in the model."""
        names = []
        for linear in site.linears:
            if linear.weight is None:
                continue
            value = parameters[linear.weight] if linear.weight in parameters else getattr(gm, str(linear.weight.target))
            name = self.names.get(id(value), linear.name)
            self.fingerprints[name] = Fingerprint.of(value)
            names.append(name)
        return self.sketches.setdefault((site.measured, tuple(names)), Sketch()) if names else None

    def calibration(self, model: str) -> Calibration:
        sites = [Measured(values, names, sketch) for (values, names), sketch in self.sketches.items()]
        return Calibration(model, self.fingerprints, sites)


class _Watching(fx.Interpreter):
    """Run a graph, and count the magnitudes of the watched values as they come."""

    def __init__(self, gm: fx.GraphModule, watched: dict[fx.Node, list[Sketch]], meter: _Meter):
        super().__init__(gm)
        self.watched, self.meter = watched, meter

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for sketch in self.watched.get(n, ()):
            sketch.add(_real(value, self.meter.real))
        return value


def _real(values: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of values [B N F] or [B*N F] that are no padding; all of them where the mask [B N] is of other rows."""
    if mask is not None and values.shape[:2] == mask.shape:
        return values[mask.to(values.device)]
    if mask is not None and values.dim() == 2 and values.shape[0] == mask.numel():
        return values[mask.flatten().to(values.device)]
    return values
