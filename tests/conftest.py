"""What every test module needs before it is imported."""

from tests.zoo.torchvision_shim import install

install()  # timm and transformers' image code import torchvision; see the shim
