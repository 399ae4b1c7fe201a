"""Triton's kernels on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["last_word"]

ROOT = Path(__file__).resolve().parents[3]


def last_word(module: str) -> str:
    """The last word that `python -m module` prints under Triton's interpreter, which must be on before Triton is
    imported: hence a process of its own."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", module]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()[-1]
