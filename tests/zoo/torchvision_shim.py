"""Makes `import torchvision` work where its C++ ops cannot load: PyPI's wheel is linked to CUDA, CI runs CPU torch.

torchvision registers fake kernels for two of its C++ ops while it is imported, and fails when the ops do not exist.
Their schemas are all that this needs: nothing in the zoo calls them, and a model that did would get torch's "no kernel"
error, not a wrong answer.
"""

from __future__ import annotations

import importlib
import sys

import torch

__all__ = ["install"]

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a Library that is garbage-collected takes its schemas with it


def install() -> None:
    """Import torchvision, declaring the two ops first if its own library does not. Calling it again does nothing."""
    try:
        importlib.import_module("torchvision")
        return
    except ModuleNotFoundError:
        return  # not installed: only timm needs it, and says so
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    importlib.import_module("torchvision")
