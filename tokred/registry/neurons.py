"""The base of methods that compute fewer neurons of an MLP, or fewer input channels of linears, for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokred.errors import ArgumentError
from tokred.registry.method import Method
from tokred.registry.sketch import Sketch

__all__ = ["Blockwise", "Chosen", "Neurons", "Sparsity", "Threshold"]

PHASES = ("decode", "masked")


@dataclass(frozen=True)
class Neurons:
    """The numbers of one place where a method may act: before anything is traced.

    layer, depth   which layer this is, of how many
    module         the module's dotted name
    role           "gate": the activated gate of an MLP; "qkv", "out", "up", "down": what these linears read
    size           how many neurons or channels there are, an int or a symbolic size
    sketch         the magnitudes that a calibration found here; None without one
    shares         how much it allocates to this place while the layer leaves out more and more, see
                   tokred.registry.allocation; None if that was not asked of it
    """

    layer: int
    depth: int
    module: str
    role: str
    size: Any
    sketch: Sketch | None = None
    shares: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Sparsity(Method):
    """A way to zero part of what linears read, so that the weights of these parts need not be read.

    phase   "decode": only in graphs of one token a sequence, where reading weights is what takes time; prompts and
            training are computed as they were. "masked": everywhere, by computing all and masking: no faster, but what
            the decoding does to a model's quality can be measured on whole texts

    acts_at     which roles (see Neurons) it has something to do at
    calibrated  whether it needs what a calibration found (tokred.calibrate)
    allocated   whether it needs each place's `shares` as well
    """

    phase: str = "decode"

    acts_at: ClassVar[tuple[str, ...]] = ()
    calibrated: ClassVar[bool] = False
    allocated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ArgumentError(f"{self.name}(phase={self.phase!r}): one of {', '.join(map(repr, PHASES))}")

    def idle(self, place: Neurons) -> bool:
        """Whether its options leave this place as it is."""
        raise NotImplementedError

    def masked(self, values: Tensor, place: Neurons) -> Tensor:
        """The definition: `values` [.. F] with zeros for what is left out. Plain tensor code, traced into the graph."""
        raise NotImplementedError

    def lacks(self, place: Neurons) -> str:
        """What a calibration did not find at this place, as a sentence that says what to do; "" if all is there."""
        return ""

    def words(self, place: Neurons) -> str:
        """What it does at this place, for the report."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Chosen(Sparsity):
    """Keeps the neurons of an MLP that a whole prompt votes for: the same ones for all samples of a batch, and for all
    tokens that are generated behind it, so that decoding is an ordinary dense product with fewer neurons.

    phase   "decode": prompts are computed as they were, and vote; "masked": each text votes, and is computed with what
            it chose, by masking
    """

    acts_at: ClassVar[tuple[str, ...]] = ("down",)

    def kept(self, place: Neurons) -> int:
        """How many neurons stay."""
        raise NotImplementedError

    def votes(self, values: Tensor) -> Tensor:
        """[.. F] what each token gives each neuron: integers, or booleans. Plain tensor code, traced into the graph.

        values   [.. F] what the last linear of the MLP reads
        """
        raise NotImplementedError

    def counted(self, values: Tensor, real: Tensor | None = None) -> Tensor:
        """[F] int64, the votes of all tokens together; `real` [.. ] is False for padding, None where there is none."""
        votes = self.votes(values)
        if real is not None:
            votes = votes * real.unsqueeze(-1)
        return votes.flatten(0, -2).sum(0, dtype=torch.int64)

    def idle(self, place: Neurons) -> bool:
        return self.kept(place) >= int(place.size)

    def masked(self, values: Tensor, place: Neurons, real: Tensor | None = None) -> Tensor:
        best = self.counted(values, real).argsort(descending=True, stable=True)[: self.kept(place)]
        chosen = torch.zeros(values.shape[-1], dtype=torch.bool, device=values.device).index_fill(0, best, True)
        return torch.where(chosen, values, 0.0)

    def words(self, place: Neurons) -> str:
        return f"{self.kept(place)} of {place.size} neurons"


@dataclass(frozen=True, kw_only=True)
class Threshold(Sparsity):
    """Leaves out what is at most a threshold in magnitude: values of which there are operators that skip weights.

    sparsity    the share left out, in [0, 1); thresholds are the calibration's quantiles
    threshold   the same threshold everywhere instead; needs no calibration
    """

    sparsity: float | None = None
    threshold: float | None = None

    default_sparsity: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is not None and self.threshold is not None:
            given = f"sparsity={self.sparsity!r}, threshold={self.threshold!r}"
            raise ArgumentError(f"{self.name}({given}): give one of the two")
        check_sparsity(self.name, self.sparsity)
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if self.threshold is not None and not (number and self.threshold >= 0):
            raise ArgumentError(f"{self.name}(threshold={self.threshold!r}): a number >= 0")

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        return self.threshold is None and self.share > 0

    @property
    def share(self) -> float:
        return self.default_sparsity if self.sparsity is None else self.sparsity

    def share_at(self, place: Neurons) -> float:
        """The share left out at one place; `share`."""
        return self.share

    def idle(self, place: Neurons) -> bool:
        return self.threshold is None and self.share_at(place) == 0

    def threshold_at(self, place: Neurons) -> float:
        """What is at most this is left out."""
        if self.threshold is not None:
            return float(self.threshold)
        assert place.sketch is not None
        return place.sketch.threshold(self.share_at(place))

    def masked(self, values: Tensor, place: Neurons) -> Tensor:
        return masked_by(values, self.threshold_at(place))

    def words(self, place: Neurons) -> str:
        threshold = self.threshold_at(place)
        if place.sketch is None:
            return f"|x| <= {threshold:.3g} left out"
        return f"|x| <= {threshold:.3g} left out, {place.sketch.share(threshold):.0%} when calibrated"


@dataclass(frozen=True, kw_only=True)
class Blockwise(Sparsity):
    """Leaves out whole blocks of an MLP's neurons, which each token chooses by what the MLP reads.

    It acts once in an MLP: at the activated gate, or where there is none at what the last linear reads. Blocks are made
    of the weights alone, and again when these have changed. Options but `layers` and `phase` must be hashable.
    """

    acts_at = ("gate", "down")

    def blocks(self, size: int) -> int:
        """How many blocks so many neurons have."""
        raise NotImplementedError

    def left(self, size: int) -> int:
        """How many of them each token computes."""
        raise NotImplementedError

    def prepare(self, *rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the weights [F C] that make the neurons, the gate's first: the number of each one's block [F], of int64,
        and a centre for each block [E C], of the weights' type. Runs outside of graphs, without gradients."""
        raise NotImplementedError

    def chosen(self, x: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
        """Which neurons [.. F] each token computes that the MLP reads as `x` [.. C]; plain tensor code, traced."""
        nearest = (x @ centres.to(x.dtype).T).topk(self.left(labels.shape[0]), dim=-1).indices
        blocks = torch.zeros(*x.shape[:-1], centres.shape[0], dtype=torch.bool, device=x.device)
        return blocks.scatter(-1, nearest, True).index_select(-1, labels)

    def blocks_masked(self, values: Tensor, x: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
        """The definition: `values` [.. F] with zeros for the neurons that a token does not compute."""
        return torch.where(self.chosen(x, labels, centres), values, 0.0)

    def idle(self, place: Neurons) -> bool:
        return self.left(place.size) == self.blocks(place.size)


def masked_by(values: Tensor, threshold: float) -> Tensor:
    """`values` with 0 for what is at most a threshold in magnitude; NaN stays."""
    magnitude = values.abs()
    if values.dtype in (torch.float16, torch.bfloat16):
        magnitude = magnitude.float()  # a threshold rounded to these would be another one
    return torch.where(magnitude <= threshold, 0.0, values)


def check_sparsity(method: str, value: float | None) -> None:
    """Raise ArgumentError unless `value` is None or a share in [0, 1)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 <= value < 1):
        raise ArgumentError(f"{method}(sparsity={value!r}): the share left out must lie in [0, 1)")
