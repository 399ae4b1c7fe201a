"""What was measured of a model: magnitudes at each site, by parameter name, with fingerprints of the parameters."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tokred.compiler.tensor_files import SAFETENSORS, read_tensors, write_tensors
from tokred.errors import CalibrationError, nearest
from tokred.registry.sketch import Sketch

__all__ = ["Calibration", "Fingerprint", "Measured"]

FORMAT, VERSION = "tokred calibration", 1
DIGEST = 8  # bytes of a hash
SAMPLES = 64  # numbers of a parameter that its fingerprint looks at


@dataclass(frozen=True)
class Fingerprint:
    """A parameter's shape and two hashes of a few of its values, taken as bfloat16 and as float16."""

    shape: tuple[int, ...]
    digest: str

    @staticmethod
    def of(parameter: Tensor) -> Fingerprint:
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].cpu()
        rounded = (sample.to(dtype).view(torch.int16).numpy().tobytes() for dtype in (torch.bfloat16, torch.float16))
        digest = "".join(hashlib.blake2b(each, digest_size=DIGEST).hexdigest() for each in rounded)
        return Fingerprint(tuple(parameter.shape), digest)

    def fits(self, other: Fingerprint) -> bool:
        """Whether the two are of one parameter, or of one and what it is cast to either type."""
        halves = (slice(2 * DIGEST), slice(2 * DIGEST, None))
        return self.shape == other.shape and any(self.digest[half] == other.digest[half] for half in halves)


@dataclass
class Measured:
    """The magnitudes of one tensor: of what the linears with these parameters read ("input"), or of the activated
    gate that the linear with this parameter makes ("gate").

    shares   how much is best left out here while its layer leaves out more and more (tokred.registry.allocation); None
             where nobody asked
    """

    values: str
    parameters: tuple[str, ...]
    sketch: Sketch
    shares: tuple[float, ...] | None = None

    @staticmethod
    def from_json(data: dict[str, Any]) -> Measured:
        """Raises ValueError, KeyError or TypeError for anything that `to_json` does not give."""
        shares = data.get("shares")
        if shares is not None:
            shares = tuple(map(float, shares))
            if not shares or not all(0 <= share < 1 for share in shares):
                raise ValueError("shares left out lie in [0, 1)")
        return Measured(data["values"], tuple(data["parameters"]), Sketch.from_json(data), shares)

    def to_json(self) -> dict[str, Any]:
        own = {"values": self.values, "parameters": list(self.parameters), **self.sketch.to_json()}
        return own if self.shares is None else {**own, "shares": list(self.shares)}

    def merge(self, other: Measured) -> None:
        """Add what was counted elsewhere; `shares` become the mean, each weighing as much as was counted with it."""
        if self.shares is not None and other.shares is not None:
            own, others = self.sketch.total, other.sketch.total
            pairs = zip(self.shares, other.shares, strict=False)  # one may end a few steps before the other
            self.shares = tuple((own * a + others * b) / (own + others) for a, b in pairs)
        self.sketch.merge(other.sketch)


class Calibration:
    """What `tokred.calibrate` returns: give it, or the path that it was saved to, as options={"calibration": ...}.

    It holds whole distributions, so that one calibration serves any sparsity. Calibrations of the same model on
    different data add up: `merge` two of them, or those of all processes with `all_merge`.
    """

    def __init__(self, model: str, parameters: dict[str, Fingerprint], sites: list[Measured]):
        self.model, self.parameters, self.sites = model, parameters, sites
        self._found = {(site.values, name): site for site in sites for name in site.parameters}

    def measured(self, values: str, name: str, parameter: Tensor) -> Measured:
        """What was measured at the linear with this parameter.

        The name may lack the outer modules' names (a model that Dynamo broke into pieces). Raises CalibrationError that
        says what differs if the calibration is of another model, or if this was not measured.
        """
        names = [known for known in self.parameters if known == name]
        names = names or [known for known in self.parameters if f".{known}".endswith(f".{name}")]
        if not names:
            hint = nearest(name, self.parameters) if len(self.parameters) < 20 else ""
            raise CalibrationError(f"the calibration of {self.model} has no parameter {name!r}.{hint}")
        if not isinstance(parameter, FakeTensor):
            now = Fingerprint.of(parameter)
            fitting = [known for known in names if self.parameters[known].fits(now)]
            if not fitting:
                raise CalibrationError(self._difference(name, self.parameters[names[0]], now))
            names = fitting
        for known in names:
            if (values, known) in self._found:
                return self._found[values, known]
        measured = ", ".join(sorted({site.values for site in self.sites}))
        reason = f"measured {measured or 'nothing'}, not {values!r} at {name!r}: calibrate with this recipe"
        raise CalibrationError(f"the calibration of {self.model} {reason}")

    def _difference(self, name: str, before: Fingerprint, now: Fingerprint) -> str:
        if before.shape != now.shape:
            shown = f"is {list(now.shape)} in the model and was {list(before.shape)} when {self.model} was calibrated"
        else:
            shown = f"has other values than when {self.model} was calibrated"
        return f"the calibration is of another model: {name!r} {shown}"

    def merge(self, other: Calibration) -> None:
        """Add what was measured of the same model on other data. Raises CalibrationError for another model's."""
        if self.parameters != other.parameters:
            names = sorted(self.parameters.keys() ^ other.parameters.keys()) or [
                name for name in self.parameters if self.parameters[name] != other.parameters[name]
            ]
            shown = f"{self.model} and {other.model} differ in {len(names)} parameters, {names[0]!r} the first"
            raise CalibrationError(f"calibrations of different models: {shown}")
        if only := sorted(self._found.keys() ^ other._found.keys()):
            values, name = only[0]
            raise CalibrationError(f"only one of two calibrations measured {values!r} at {name!r}")
        pairs = [(self._found[site.values, site.parameters[0]], site) for site in other.sites]
        for own, site in pairs:
            if (own.shares is None) != (site.shares is None):
                raise CalibrationError(f"only one of two calibrations allocated shares to {site.parameters[0]!r}")
        for own, site in pairs:
            own.merge(site)

    def all_merge(self, group: Any = None) -> None:
        """Add up what the processes of a torch.distributed group measured: all of them then hold the same."""
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(gathered, self.to_json(), group)
        for site in self.sites:
            site.sketch.counts[:] = 0
        for data in gathered:
            self.merge(Calibration.from_json(data, "another process"))

    def save(self, path: str | Path) -> Path:
        """Write safetensors where that is the path's suffix (the package must be installed), else JSON; returns the
        path."""
        path = Path(path)
        if path.suffix == SAFETENSORS:
            write_tensors(path, self.to_json())
        else:
            path.write_text(json.dumps(self.to_json()))
        return path

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """What `save` wrote. Raises CalibrationError for a file that is missing, truncated, of another kind, or with
        NaN in it."""
        path = Path(path)
        try:
            data = read_tensors(path) if path.suffix == SAFETENSORS else json.loads(path.read_text())
        except OSError as error:
            raise CalibrationError(f"calibration {str(path)!r}: {error.strerror or error}") from None
        except ValueError as error:
            kind = "safetensors" if path.suffix == SAFETENSORS else "JSON"
            raise CalibrationError(f"calibration {str(path)!r} is truncated or no {kind}: {error}") from None
        return Calibration.from_json(data, str(path))

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        parameters = {name: [list(found.shape), found.digest] for name, found in self.parameters.items()}
        sites = [site.to_json() for site in self.sites]
        return {"format": FORMAT, "version": VERSION, "model": self.model, "parameters": parameters, "sites": sites}

    @staticmethod
    def from_json(data: Any, where: str) -> Calibration:
        """Raises CalibrationError, which names `where`, for anything that `to_json` does not give."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise CalibrationError(f"calibration {where!r} is none: no {FORMAT!r} in it")
        if data.get("version") != VERSION:
            raise CalibrationError(f"calibration {where!r} has version {data.get('version')!r}, this is {VERSION}")
        try:
            parameters = {name: Fingerprint(tuple(shape), str(d)) for name, (shape, d) in data["parameters"].items()}
            sites = [Measured.from_json(site) for site in data["sites"]]
            found = Calibration(str(data["model"]), parameters, sites)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CalibrationError(f"calibration {where!r} is damaged: {type(error).__name__}: {error}") from None
        found.check()
        return found

    def check(self) -> None:
        """Raise CalibrationError where nothing, or what is no number, was measured."""
        for site in self.sites:
            name = f"{site.values!r} at {site.parameters[0]!r}" if site.parameters else "a site without parameters"
            if not site.sketch.finite:
                raise CalibrationError(f"the calibration of {self.model} met infinite numbers, or NaN, in {name}")
            if site.sketch.total == 0:
                raise CalibrationError(f"the calibration of {self.model} counted nothing in {name}")
