"""What every test module needs before it is imported, and fixtures that many ask for."""

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.zoo.torchvision_shim import install

install()  # timm and transformers' image code import torchvision; see the shim


def pytest_collection_finish() -> None:
    """Compiling makes millions of objects: cycles are looked for less often, and not among what imports left."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Neither reports nor compiled code of another test: `pytestmark = pytest.mark.usefixtures("fresh")`."""
    import tokred

    tokred.reset()
    torch.compiler.reset()
    yield
    torch.compiler.reset()
