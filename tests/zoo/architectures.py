"""The zoo: every family's rows in one table, by name."""

from __future__ import annotations

from tests.zoo import audio, decoders, dense, diffusion, text, torch_nn, torchvision_shim, vision, vlms
from tests.zoo.architecture import Architecture

torchvision_shim.install()

from tests.zoo import timm_models  # noqa: E402  (timm imports torchvision)

__all__ = ["ARCHITECTURES"]

_FAMILIES = (vision, timm_models, dense, text, audio, diffusion, torch_nn, decoders, vlms)
_ROWS = [row for family in _FAMILIES for row in family.ARCHITECTURES]

ARCHITECTURES: dict[str, Architecture] = {row.name: row for row in _ROWS}
assert len(ARCHITECTURES) == len(_ROWS), "two architectures share a name"
