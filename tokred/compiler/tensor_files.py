"""Calibrations as safetensors files: the JSON form, of which the long lists of numbers are tensors beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tokred.errors import CalibrationError

__all__ = ["SAFETENSORS", "read_tensors", "write_tensors"]

SAFETENSORS = ".safetensors"  # the suffix of such a file
LISTS = {"bins": np.int64, "counts": np.int64, "shares": np.float64}


def write_tensors(path: Path, data: dict[str, Any]) -> None:
    """Write what `Calibration.to_json` gives: list `counts` of site 3 as tensor "3.counts", the rest as metadata.

    Raises CalibrationError where safetensors is not installed.
    """
    sites = [{name: value for name, value in site.items() if name not in LISTS} for site in data["sites"]]
    tensors = {
        f"{number}.{name}": np.array(site[name], kind)
        for number, site in enumerate(data["sites"])
        for name, kind in LISTS.items()
        if name in site
    }
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise CalibrationError(f"calibration {str(path)!r}: install safetensors to write it, or save JSON") from None
    save_file(tensors, path, {"calibration": json.dumps({**data, "sites": sites})})


def read_tensors(path: Path) -> Any:
    """What `write_tensors` was given, whatever it may be worth: `Calibration.from_json` looks at that.

    Raises OSError for a file that cannot be opened, ValueError for one that is truncated or none, CalibrationError
    where safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise CalibrationError(f"calibration {str(path)!r}: install safetensors to read it") from None
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    data = json.loads(metadata.get("calibration", "null"))
    sites = data.get("sites") if isinstance(data, dict) else None
    for number, site in enumerate(sites if isinstance(sites, list) else ()):
        if isinstance(site, dict):
            own = {name: tensors.get(f"{number}.{name}") for name in LISTS}
            site.update({name: values.tolist() for name, values in own.items() if values is not None})
    return data
