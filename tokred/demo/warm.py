"""`python -m tokred.demo.warm RECIPE ...`: compile the demo's model with each recipe, to fill Inductor's cache.

Tracing and g++ leave a core idle now and then. The demo starts this beside itself, with its recipes from the last to
the first, and finds those that it comes to later in the cache.
"""

from __future__ import annotations

import sys

import torch

from tokred.demo.data import digits, split
from tokred.demo.model import load
from tokred.demo.run import BATCH

__all__ = ["warm"]


def warm(recipes: list[str]) -> None:
    images = digits(split()[1])[0][:BATCH]
    model = load()
    with torch.no_grad():
        for recipe in recipes:
            torch._dynamo.reset()
            torch.compile(model, backend="tokred", options={"recipe": recipe})(images)


if __name__ == "__main__":
    warm(sys.argv[1:])
