"""What a good engineer would write by hand for one ViT: dense, ideal (a slice for a reduction), and ToMe.

All three are the same modules in the same spelling, so what differs in time is the reduction alone. Weights come from
timm's VisionTransformer or transformers' ViTForImageClassification.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HandWritten", "Ideal", "ToMe", "load_weights"]


class Block(nn.Module):
    """Pre-norm attention and MLP with packed q, k, v."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def attend(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The stream after the attention residual, and the keys [B H N D]."""
        batch, n, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + self.proj(out.transpose(1, 2).reshape(batch, n, width)), k

    def mlp(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class HandWritten(nn.Module):
    """A dense ViT classifier that reads the class token."""

    def __init__(
        self, width: int, depth: int, heads: int, *, image: int, patch: int, classes: int, eps: float = 1e-6
    ) -> None:
        super().__init__()
        tokens = (image // patch) ** 2 + 1
        self.patch = nn.Conv2d(3, width, patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.head = nn.Linear(width, classes)

    def embed(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.position

    def encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block.attend(x)
            x = block.mlp(x)
        return x

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.norm(self.encode(self.embed(pixels)))[:, 0])


class Ideal(HandWritten):
    """The token counts of ToMe with a reduction that costs nothing: the last `r` tokens are cut off."""

    def __init__(self, *args: int, r: Sequence[int], **options: float) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.r = list(r)

    def encode(self, x: Tensor) -> Tensor:
        for block, r in zip(self.blocks, self.r, strict=True):
            x, _ = block.attend(x)
            x = block.mlp(x[:, : x.shape[1] - removable(r, x.shape[1])])
        return x


class ToMe(Ideal):
    """Bipartite soft matching after each attention residual, log(size) in the attention (arXiv 2210.09461)."""

    def encode(self, x: Tensor) -> Tensor:
        size: Tensor | None = None
        for block, r in zip(self.blocks, self.r, strict=True):
            bias = None if size is None else size.log().transpose(1, 2)[:, None]  # [B 1 1 N]
            x, keys = block.attend(x, bias)
            r = removable(r, x.shape[1])
            if r > 0:
                x, size = merge(x, size, keys.mean(dim=1), r)
            x = block.mlp(x)
        return x


def removable(r: int, n: int) -> int:
    return min(r, (n - 1) // 2)


def merge(x: Tensor, size: Tensor | None, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Merge `r` tokens at even positions into their most similar ones at odd positions; row 0 is the class token."""
    with torch.no_grad():
        metric = F.normalize(metric, dim=-1)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        best, target = scores.max(dim=-1)
        best[:, 0] = -torch.inf  # the class token sorts last, so it is never merged
        order = best.argsort(dim=-1, descending=True, stable=True)
        source, kept = order[:, :r, None], order[:, r:].sort(dim=-1).values[..., None]
        target = target[..., None].gather(1, source)

    mass = torch.ones_like(x[..., :1]) if size is None else size
    packed = torch.cat([x * mass, mass], dim=-1)  # one gather and one scatter for the sums and the sizes
    width = packed.shape[-1]
    even, odd = packed[:, ::2], packed[:, 1::2]
    moved = even.gather(1, source.expand(-1, -1, width))
    sums = odd.scatter_add(1, target.expand(-1, -1, width), moved)
    packed = torch.cat([even.gather(1, kept.expand(-1, -1, width)), sums], dim=1)
    size = packed[..., -1:]
    return packed[..., :-1] / size, size


def load_weights(target: HandWritten, source: nn.Module) -> None:
    """Copy the weights of a timm VisionTransformer or a transformers ViTForImageClassification."""
    state = _from_transformers(source) if hasattr(source, "vit") else _from_timm(source)
    target.load_state_dict(state)


def _from_timm(source: nn.Module) -> dict[str, Tensor]:
    names = {
        "patch_embed.proj": "patch",
        "cls_token": "cls",
        "pos_embed": "position",
        ".attn.": ".",
        ".mlp.": ".",
    }
    state = {}
    for name, value in source.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = value
    return state


def _from_transformers(source: nn.Module) -> dict[str, Tensor]:
    old = source.state_dict()
    state = {
        "cls": old["vit.embeddings.cls_token"],
        "position": old["vit.embeddings.position_embeddings"],
    }
    renamed = {"vit.embeddings.patch_embeddings.projection": "patch", "vit.layernorm": "norm", "classifier": "head"}
    parts = {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention.o_proj": "proj"}
    parts |= {"mlp.fc1": "fc1", "mlp.fc2": "fc2"}
    depth = len(source.vit.layers)  # type: ignore[union-attr, arg-type]
    for i in range(depth):
        renamed |= {f"vit.layers.{i}.{part}": f"blocks.{i}.{new}" for part, new in parts.items()}
    for kind in ("weight", "bias"):
        state |= {f"{new}.{kind}": old[f"{name}.{kind}"] for name, new in renamed.items()}
        for i in range(depth):
            packed = [old[f"vit.layers.{i}.attention.{part}_proj.{kind}"] for part in "qkv"]
            state[f"blocks.{i}.qkv.{kind}"] = torch.cat(packed)
    return state
