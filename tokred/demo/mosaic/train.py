"""Train the mosaic model's checkpoint from scratch: `python -m tokred.demo.mosaic.train`.

Two stages, as LLaVA has them. First the vision tower alone, as CLIP's is trained before: a linear head on what the
projector gives says which digit each patch is part of and in which cell it is, and one on the class token how often
each digit is in the mosaic, which gives the class token's attention a meaning. Then everything, with the questions;
both heads go on as auxiliary losses. They are thrown away: the checkpoint has transformers' own parameters alone.

The checkpoint that comes with tokred was trained in two sittings on a busy machine: 1000 steps of the first stage and
500 of the second with AdamW and fewer questions to a mosaic; then 922 steps of what is below, with `--vision 0 --start`
and the first's weights. What is below has not been run from scratch to its end.

No distillation, no token reduction while training: what the table measures is an ordinary model.
"""

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.demo.mosaic.data import (
    BOS,
    CELL,
    CELLS,
    EOS,
    KINDS,
    PATCH,
    PATCHES,
    QUESTIONS,
    Samples,
    answers,
    arrange,
    ask,
    bank,
    draw,
    samples,
)
from tokred.demo.mosaic.model import CHECKPOINT, build, load
from tokred.demo.train import augment

__all__ = ["accuracy", "main", "train"]

RATE = 2e-3
EACH = (10, 8, 6)  # questions of each kind to one mosaic, in one packed row


class Heads(nn.Module):
    """What the auxiliary losses read: which digit (or none) and which cell at each patch, how often each digit."""

    def __init__(self, vision: int, text: int) -> None:
        super().__init__()
        self.digit = nn.Linear(text, 11)
        self.cell = nn.Linear(text, CELLS * CELLS)
        self.often = nn.Linear(vision, 10 * 6)

    def forward(self, features: Tensor, pooled: Tensor, cells: Tensor) -> Tensor:
        """The loss of image features [B 100 C], the pooled class token [B C] and the true cells [B 25]."""
        where = of_patches()
        digit = F.cross_entropy(self.digit(features).flatten(0, 1), (cells + 1)[:, where].flatten())
        cell = F.cross_entropy(self.cell(features).flatten(0, 1), where.repeat(len(cells)))
        counts = F.one_hot(cells + 1, 11)[:, :, 1:].sum(1)
        often = F.cross_entropy(self.often(pooled).view(-1, 6), counts.flatten().clamp(max=5))
        return digit + 0.1 * cell + 0.5 * often


def of_patches() -> Tensor:
    """The cell [100] that each patch is in."""
    line = torch.arange(CELLS).repeat_interleave(CELL // PATCH)
    return (line[:, None] * CELLS + line).flatten()


def mosaics(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cells [B 25] and mosaics [B 1 40 40] of training digits, half of them moved a little, all with a little noise."""
    cells = arrange(batch, generator)
    digits = bank(held_out=False).pick(cells[cells >= 0], generator)[:, None]
    moved = torch.rand(len(digits), 1, 1, 1, generator=generator) < 0.5
    images = draw(cells, torch.where(moved, augment(digits, generator), digits)[:, 0])
    return cells, images + 0.05 * torch.randn(images.shape, generator=generator)


class Packed:
    """A mosaic and several questions in one row: each question sees the mosaic and itself, and starts where it ends."""

    def __init__(self, each: tuple[int, int, int]) -> None:
        sizes = [len(next(q for q in QUESTIONS if q.kind == kind).ids) + 1 for kind in KINDS]  # and the answer
        lengths = [size for size, number in zip(sizes, each, strict=True) for _ in range(number)]
        prefix = 1 + PATCHES
        owner = torch.cat(
            [torch.zeros(prefix), torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))]
        )
        seen = (owner == owner[:, None]) | (owner == 0)
        rows = len(owner)
        causal = torch.ones(rows, rows, dtype=torch.bool).tril()
        self.mask = torch.zeros(1, 1, rows, rows).masked_fill(~(seen & causal), torch.finfo(torch.float32).min)
        self.positions = torch.cat([torch.arange(prefix), *[prefix + torch.arange(length) for length in lengths]])[None]
        ends = torch.tensor(lengths).cumsum(0) + prefix - 1  # the answers' rows
        self.read = torch.cat([ends - 1, ends])

    def ids(self, numbers: Tensor, right: Tensor) -> Tensor:
        """Questions [B Q] and their answers [B Q] as words, one after another."""
        rows = [
            [word for number, answer in zip(*pair, strict=True) for word in (*QUESTIONS[number].ids, answer)]
            for pair in zip(numbers.tolist(), right.tolist(), strict=True)
        ]
        return torch.tensor(rows)


def see(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the language model gets [B 100 C], and the pooled class token [B C]."""
    seen = model.model.vision_tower(images, output_hidden_states=True)
    return model.model.multi_modal_projector(seen.hidden_states[-2][:, 1:]), seen.pooler_output


def read(model: Any, features: Tensor, cells: Tensor, packed: Packed, generator: torch.Generator) -> Tensor:
    """The loss of the answers, and of the end behind each, to questions drawn for `cells`."""
    numbers = ask(cells, EACH, generator)
    right = answers(cells).gather(1, numbers)
    embed = model.get_input_embeddings()
    start = embed(torch.full((len(cells), 1), BOS))
    stream = torch.cat([start, features, embed(packed.ids(numbers, right))], dim=1)
    language = model.model.language_model
    hidden = language(
        inputs_embeds=stream, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state[:, packed.read]
    targets = torch.cat([right, torch.full_like(right, EOS)], dim=1)
    losses = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten(), reduction="none")
    said, ended = losses.view(len(cells), 2, -1).mean((0, 2))
    loss: Tensor = said + 0.1 * ended
    return loss


@torch.no_grad()
def accuracy(model: Any, data: Samples, batch: int = 60) -> dict[str, float]:
    """The fraction of right answers to each kind of question: the most likely of all words behind the prompt."""
    right = []
    for start in range(0, len(data), batch):
        part = slice(start, start + batch)
        logits = model(**data.inputs(part), logits_to_keep=1).logits[:, -1]
        right.append(logits.argmax(-1) == data.answer[part])
    hits = torch.cat(right).double()
    return {kind: float(hits[data.kind == number].mean()) for number, kind in enumerate(KINDS)}


def save(model: Any, path: Path) -> None:
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, partial)
    partial.replace(path)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for matrices: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.

    Learns attention in about half of AdamW's steps. torch.optim.Muon iterates in bfloat16, which many CPUs emulate.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            alike: dict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    average = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    average.lerp_(parameter.grad, 1 - group["momentum"])
                    ahead = parameter.grad.lerp(average, group["momentum"])
                    alike[parameter.shape].append((parameter, ahead))
            for shape, pairs in alike.items():
                size = group["lr"] * 0.2 * max(shape) ** 0.5  # as large as AdamW's steps: Liu et al., arXiv 2502.16982
                updates = orthogonal(torch.stack([ahead for _, ahead in pairs]))
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"]).sub_(update, alpha=size)


def orthogonal(x: Tensor) -> Tensor:
    """About the nearest orthogonal matrix of each of x [M A B], by five Newton-Schulz iterations."""
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    found: Tensor = wide if x.shape[1] <= x.shape[2] else wide.mT
    return found


def optimizers(*modules: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for all else."""
    named = [pair for module in modules for pair in module.named_parameters()]
    matrices = [p for name, p in named if p.dim() == 2 and ("layers" in name or "linear" in name)]
    others = [p for name, p in named if not any(p is matrix for matrix in matrices)]
    return [Muon(matrices, lr=RATE), torch.optim.AdamW(others, lr=RATE, weight_decay=0.01, betas=(0.9, 0.98))]


def descend(loss: Tensor, both: list[torch.optim.Optimizer]) -> None:
    """One step of each optimizer, whose gradients are clipped to a norm of 1."""
    for optimizer in both:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in both:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()


def train(model: Any, vision: int, steps: int, minutes: float, path: Path, seed: int = 0) -> None:
    """`vision` steps for the tower and the projector, then `steps`, or as many as `minutes` allow, for everything."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    packed, scored = Packed(EACH), samples(100)
    heads = Heads(model.config.vision_config.hidden_size, model.config.text_config.hidden_size)
    start = time.perf_counter()
    for stage, total in (("vision", vision), ("all", steps)):
        both, began, step, done, recent = optimizers(model, heads), time.perf_counter(), 0, float(total == 0), []
        while done < 1:
            step += 1
            done = step / total
            if stage == "all":
                done = max(done, (time.perf_counter() - began) / (60 * minutes))
            for optimizer in both:
                optimizer.param_groups[0]["lr"] = RATE * min(1, step / 100, max(0.01, 1.6 * (1 - done)))
            cells, images = mosaics(16 if stage == "vision" else 8, generator)
            features, pooled = see(model, images)
            loss = auxiliary = heads(features, pooled, cells)
            if stage == "all":
                loss = read(model, features, cells, packed, generator) + 0.3 * min(1, step / 300) * auxiliary
            descend(loss, both)
            recent.append([loss.item(), auxiliary.item()])
            if step % 100 == 0 or done >= 1:
                losses = "loss {:.3f}, of it auxiliary {:.3f}".format(*map(mean, zip(*recent, strict=True)))
                print(f"{stage} {step:5d}  {losses}  {time.perf_counter() - start:.0f} s", flush=True)
                recent = []
            if step % 500 == 0 or done >= 1:
                save(model, path)
                scores = {"patches": patches(model, heads)} | (accuracy(model, scored) if stage == "all" else {})
                print("held out: " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items()), flush=True)


@torch.no_grad()
def patches(model: Any, heads: Heads) -> float:
    """The fraction of the held-out mosaics' digits that the patches' head reads right."""
    generator = torch.Generator().manual_seed(1)
    cells = arrange(200, generator)
    images = draw(cells, bank(held_out=True).pick(cells[cells >= 0], generator))
    truth = (cells + 1)[:, of_patches()]
    guesses = heads.digit(see(model, images)[0]).argmax(-1)
    return float((guesses == truth)[truth > 0].double().mean())


def main() -> None:
    """Train, and write the weights as float16."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vision", type=int, default=1000, help="steps of the first stage")
    parser.add_argument("--steps", type=int, default=1500, help="steps of the second")
    parser.add_argument("--minutes", type=float, default=math.inf, help="when the second ends at the latest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="a checkpoint to go on with")
    parser.add_argument("--path", type=Path, default=CHECKPOINT, help="where to write the checkpoint")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = load(args.start) if args.start else build()
    train(model, args.vision, args.steps, args.minutes, args.path, args.seed)
    print(f"wrote {args.path}, {args.path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
