"""The base of every method, options as dataclass fields; and of token methods: how much goes where, and the plan."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, ClassVar

from torch import Tensor

from tokred.errors import ArgumentError
from tokred.registry.maps import TokenMap
from tokred.registry.site import Place, Site

__all__ = [
    "Method",
    "Reduction",
    "Share",
    "check_flag",
    "check_fraction",
    "check_int",
    "check_layers",
    "check_r",
    "keep_fraction",
    "per_layer",
]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to compute less. Subclasses are frozen dataclasses whose fields are the method's options.

    layers   where it may act: ints (negative from the end), a slice such as "8:24", or a glob on module names;
             None is the method's own choice (`default_layers`)
    """

    layers: int | list[int] | tuple[int, ...] | str | None = None

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""

    def default_layers(self, depth: int) -> list[int] | None:
        """The layers that `layers=None` stands for; None is all of them."""
        return None

    def acts_on(self, layer: int, depth: int, module: str) -> bool:
        """Whether `layers` selects this attention block."""
        chosen = self.default_layers(depth) if self.layers is None else self.layers
        if chosen is None:
            return True
        if isinstance(chosen, int):
            chosen = [chosen]
        if isinstance(chosen, str):
            if ":" in chosen:
                return layer in range(depth)[_slice(chosen)]
            return fnmatch(module, chosen)
        return layer in {number % depth if number < 0 else number for number in chosen}

    def __str__(self) -> str:
        from dataclasses import fields

        given = [(f.name, getattr(self, f.name)) for f in fields(self)]
        shown = ", ".join(f"{name}={value!r}" for name, value in given if value is not None)
        return f"{self.name}({shown})"


@dataclass(frozen=True, kw_only=True)
class Reduction(Method):
    """A way to compute fewer tokens.

    needs    what the site must have: "keys", "queries", "class_token", "grid", "visual" (a span of image features),
             "tower" (the vision encoder that made them), "prepared" (what `prepare` computed once),
             other spans, which are then in the site's `spans`: "text", "prefix" (text in front of the first image),
             "instruction" (text behind the last), "images" (which image a token is of), "padding",
             "neurons" (what the MLP of the layer before makes of the tokens), "earlier" (beside "queries": those of one
             layer more before)
    wants    what of these the site shows where it has it, and does without where it has not
    scope    "persistent": the stream stays short from this attention on; "layer": from what enters this layer on;
             "round_trip": only this attention sees fewer tokens
    probe    whose queries and keys a "layer" method sees: those of the "previous" layer, or of the "next" one, which is
             the layer itself, computed for the tokens that it would have had
    skips    "layer" scope: the tokens that are removed go around this one layer, its attention and its MLP, and are
             back in what enters the next
    merges   "visual": mixes tokens of the visual span with one another and with nothing else, and keeps all others in
             order. Under causal attention that leaks nothing into the text, if the span is one piece in every sample:
             asserted when the model runs
    """

    needs: ClassVar[tuple[str, ...]] = ()
    wants: ClassVar[tuple[str, ...]] = ()
    scope: ClassVar[str] = "persistent"
    probe: ClassVar[str] = "previous"
    skips: ClassVar[bool] = False
    averages: ClassVar[bool] = True  # each new row is a mean of old ones: its weights sum to one
    merges: ClassVar[str] = ""
    causal_safe: ClassVar[bool] = False  # keeps rows in order and never mixes them, so causal attention stays right

    def needs_at(self, layer: int, depth: int) -> tuple[str, ...]:
        """What the site must have at this layer, for methods that do not do the same at all; `needs`."""
        return self.needs

    def wants_at(self, layer: int, depth: int) -> tuple[str, ...]:
        """The same for `wants`."""
        return self.wants

    def restores(self, layer: int, depth: int) -> bool:
        """Whether all tokens are back in what enters this layer ("layer" scope), those that were dropped before it with
        the values that they had then."""
        return False

    def encoder_layers(self, depth: int) -> list[int]:
        """Of which layers of the vision encoder, from 0, a method that needs "tower" sees the attention as well; the
        last of its `depth` layers in front of the features is always there."""
        return []

    def prepare(self, site: Site) -> Tensor:
        """[B N] what a method that needs "prepared" computes once, from what enters layer 0 (the site's `hidden`).

        Later sites have it as `prepared`, at the rows that are left there.
        """
        raise NotImplementedError

    def removed(self, place: Place) -> Any:
        """How many tokens disappear at this place; 0 leaves the site alone. Numbers only: called before tracing."""
        raise NotImplementedError

    def plan(self, site: Site) -> TokenMap:
        """The token map for this site: plain tensor code, traced into the model's graph."""
        raise NotImplementedError

    def revise(self, site: Site, token_map: TokenMap) -> Tensor:
        """[B N C] what the map then reduces: the stream itself, or with other values in some rows."""
        return site.hidden

    def weigh(self, site: Site) -> Tensor:
        """[B N] of a method that `skips`: a factor on what the layer's MLP adds to a row that goes through it, or on
        the row itself if it goes around."""
        return site.members()


@dataclass(frozen=True)
class Share(Reduction):
    """A reduction that keeps a share of the unprotected tokens at a few layers.

    keep     fraction kept, in (0, 1]
    ratio    fraction removed, in [0, 1); give one of the two
    layers   None is three cuts, a quarter, half and three quarters of the way (EViT's 3, 6, 9 of 12), or one cut in the
             middle of fewer than four blocks
    """

    keep: float | None = None
    ratio: float | None = None

    default_keep: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        keep_fraction(self.name, self.keep, self.ratio, self.default_keep)

    @property
    def kept(self) -> float:
        """The fraction kept, however it was given."""
        return keep_fraction(self.name, self.keep, self.ratio, self.default_keep)

    def default_layers(self, depth: int) -> list[int]:
        return [depth // 4, depth // 2, 3 * depth // 4] if depth >= 4 else [depth // 2]

    def removed(self, place: Place) -> Any:
        return place.free - place.count(self.kept)


def _slice(text: str) -> slice:
    try:
        parts = [int(part) if part.strip() else None for part in text.split(":")]
        return slice(*parts)
    except (TypeError, ValueError):
        raise ArgumentError(f"layers={text!r} is neither a slice such as '8:24' nor a glob on module names") from None


def check_layers(method: str, layers: Any) -> None:
    """Raise ArgumentError unless `layers` is None, an int, ints, a slice such as "8:24", or a glob on module names."""
    if isinstance(layers, str):
        if ":" in layers:
            _slice(layers)
        return
    numbers = layers if isinstance(layers, (list, tuple)) else [] if layers is None else [layers]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise ArgumentError(f"{method}(layers={layers!r}): ints, a slice such as '8:24', or a glob on module names")


def check_flag(method: str, name: str, value: Any) -> None:
    """Raise ArgumentError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{method}({name}={value!r}): True or False")


def check_int(method: str, name: str, value: Any, least: int | None = None) -> None:
    """Raise ArgumentError unless `value` is an int, and at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise ArgumentError(f"{method}({name}={value!r}): an int" + ("" if least is None else f" >= {least}"))


def check_fraction(method: str, name: str, value: float | None) -> None:
    """Raise ArgumentError unless `value` is None or a fraction that leaves some: [0, 1) removed, (0, 1] kept."""
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "keep":
        if not number or not 0 < value <= 1:
            raise ArgumentError(f"{method}({name}={value!r}): the fraction kept must lie in (0, 1]")
    elif not number or not 0 <= value < 1:
        raise ArgumentError(f"{method}({name}={value!r}): the fraction removed must lie in [0, 1)")


def keep_fraction(method: str, keep: float | None, ratio: float | None, default: float) -> float:
    """The fraction kept, from `keep` or `ratio` (the fraction removed); giving both is an error."""
    if keep is not None and ratio is not None:
        raise ArgumentError(f"{method}(keep={keep!r}, ratio={ratio!r}): give one; ratio is the fraction removed")
    check_fraction(method, "keep", keep)
    check_fraction(method, "ratio", ratio)
    if ratio is not None:
        return 1 - ratio
    return default if keep is None else keep


def per_layer(r: Any, layer: int, depth: int) -> int:
    """ToMe's schedule forms: int everywhere; list, one a layer, missing ones 0; (r, inflection), a linear ramp."""
    if isinstance(r, tuple):
        low = r[0] * (1 - r[1])
        high = 2 * r[0] - low
        return int(low + (high - low) / max(depth - 1, 1) * layer)
    if isinstance(r, list):
        return int(r[layer]) if layer < len(r) else 0
    return int(r)


def check_r(method: str, r: Any) -> None:
    """Raise ArgumentError unless `r` is one of the forms that `per_layer` reads."""
    if isinstance(r, tuple) and not (len(r) == 2 and isinstance(r[1], (int, float)) and -1 <= r[1] <= 1):
        raise ArgumentError(f"{method}(r={r!r}): a ramp is (r, inflection) with inflection in [-1, 1]")
    for value in r[:1] if isinstance(r, tuple) else r if isinstance(r, list) else [r]:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ArgumentError(f"{method}(r={r!r}): tokens per layer: an int >= 0, a list of them, or (r, inflection)")
