"""A C++ file of this folder as a library: compiled by the machine's compiler at first use, kept in Inductor's cache.

Plain C functions for ctypes, so no header of torch is read and a compilation takes a second or two.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

__all__ = ["library"]

log = logging.getLogger("tokred")

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-Wno-psabi")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
INSTRUCTIONS = {"AVX2": AVX2, "AVX512": (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")}


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The functions of `name`.cpp, or None, said once in the log, where they cannot be compiled or loaded.

    -fopenmp names the OpenMP library that torch has loaded already: threads are torch's own.
    """
    try:
        return ctypes.CDLL(str(_compiled(Path(__file__).with_name(f"{name}.cpp"))))
    except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
        text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        log.warning("%s.cpp could not be compiled, a slower form runs instead: %s", name, text.strip()[:500])
        return None


def _compiled(source: Path) -> Path:
    """Where the library is; two processes that compile at once each put a whole file there."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    command = [get_cpp_compiler(), *FLAGS, *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())]
    key = hashlib.sha256("\0".join([*command, torch.__version__, source.read_text()]).encode()).hexdigest()[:32]
    path = Path(cache_dir()) / "tokred" / f"{source.stem}_{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, written = tempfile.mkstemp(suffix=".so", dir=path.parent)
        os.close(handle)
        try:
            subprocess.run([*command, str(source), "-o", written], check=True, capture_output=True, text=True)
            os.replace(written, path)
        finally:
            Path(written).unlink(missing_ok=True)
    return path
