"""What every test module needs before it is imported, and fixtures that many ask for."""

from collections.abc import Iterator

import pytest
import torch

from tests.zoo.torchvision_shim import install

install()  # timm and transformers' image code import torchvision; see the shim


@pytest.fixture
def fresh() -> Iterator[None]:
    """Neither reports nor compiled code of another test: `pytestmark = pytest.mark.usefixtures("fresh")`."""
    import tokred

    tokred.reset()
    torch.compiler.reset()
    yield
    torch.compiler.reset()
