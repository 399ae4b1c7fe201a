"""Train the demo's checkpoint from scratch: `python -m tokred.demo.train`, about five minutes on two cores.

No distillation, no token reduction while training: what the demo measures is an ordinary model.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.demo.data import digits, split
from tokred.demo.model import CHECKPOINT, DigitViT

__all__ = ["accuracy", "main", "train"]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, rotate and scale each image [B 1 32 32] a little; what comes in from outside is background."""
    batch = len(images)

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(batch, generator=generator) - 1) * limit

    angle, scale = uniform(0.17), 1 + uniform(0.1)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos, -sin, uniform(0.12), sin, cos, uniform(0.12)], dim=1).view(batch, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # background is -1, and padding is 0


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """The fraction of images whose largest logit is the label's."""
    guesses = torch.cat([model(part).argmax(dim=-1) for part in images.split(108)])
    return float((guesses == labels).double().mean())


def train(epochs: int, batch: int = 64, rate: float = 1e-3, seed: int = 0) -> DigitViT:
    """AdamW, one warm-up epoch in twenty and a cosine to zero; prints the held-out accuracy now and then."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, held_out = split()
    images, labels = digits(rows)
    model = DigitViT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for part in order.split(batch)[: len(images) // batch]:
            loss = F.cross_entropy(model(augment(images[part], generator)), labels[part], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if epoch % 5 == 0 or epoch == epochs:
            right = accuracy(model.eval(), *digits(held_out))
            seconds = time.perf_counter() - start
            print(f"epoch {epoch:3d}  loss {loss.item():.3f}  held out {right:.4f}  {seconds:.0f} s", flush=True)
    return model.eval()


def main() -> None:
    """Train, and write the weights as float16 (1.6 MB)."""
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--path", type=Path, default=CHECKPOINT, help="where to write the checkpoint")
    args = parser.parse_args()
    model = train(args.epochs, seed=args.seed)
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, args.path)
    print(f"wrote {args.path}, {args.path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
