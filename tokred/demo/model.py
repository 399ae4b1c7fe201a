"""A small vision transformer for handwritten digits: plain PyTorch that knows nothing of tokred."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CHECKPOINT", "Block", "DigitViT", "example", "load"]

CHECKPOINT = Path(__file__).with_name("digits_vit.safetensors")


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the stream."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B H N D]
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(y)
        z: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + z


class DigitViT(nn.Module):
    """Images [B 1 32 32] -> logits [B 10]: 64 patch tokens of 4x4 pixels and a class token, which the head reads."""

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4, hidden: int = 512) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=4, stride=4)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 65, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)  # [B 64 C]
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.positions  # [B 65 C]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def load(path: Path = CHECKPOINT) -> DigitViT:
    """The trained model in eval mode, float32 (the file holds float16, to stay small)."""
    from safetensors.torch import load_file

    model = DigitViT()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval()


def example(batch: int = 54) -> tuple[DigitViT, tuple[Tensor], dict[str, object]]:
    """The trained model and held-out images, as a MODEL of the command line: `tokred.demo.model:example`."""
    from tokred.demo.data import digits, split

    images, _ = digits(split()[1][:batch])
    return load(), (images,), {}
