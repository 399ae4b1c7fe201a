"""Train the language models' checkpoints: `python -m tokred.demo.language.train`, then the same with `--relu`.

Next-token prediction on the training files, windows from anywhere in them; Muon for the layers' matrices and AdamW for
the embedding. The second model starts with the first one's weights: only its gate's activation is another.

The checkpoints that come with tokred are one run each, from its start to its end, on two cores that others used too:
`--minutes 38`, then `--relu --rate 2e-3 --minutes 9`. How many steps that is depends on the machine, 1756 and 415
there, of 1024 tokens each: less than the text once. No sparsity while training. Their last lines:

    llama_silu.safetensors, 3.15 MB: perplexity 41.44, 1.512 bits per byte
    llama_relu.safetensors, 3.15 MB: perplexity 41.39, 1.512 bits per byte

On the same files counts of tokens give a perplexity of 725.9 and counts of pairs one of 92.4 (`score.baselines`).
"""

import argparse
import math
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.demo.language.data import TOKENIZER, Corpus, corpus, train_tokenizer
from tokred.demo.language.model import WINDOW, build, checkpoint, load
from tokred.demo.language.score import baselines, bits_per_byte, perplexity
from tokred.demo.mosaic.train import descend, optimizers, save

__all__ = ["main", "train"]

BATCH = 4
SAMPLE = 32  # held-out windows that are scored on the way


def draw(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Some pieces of the text, from anywhere: [B WINDOW + 1]."""
    starts = torch.randint(len(tokens) - WINDOW, (BATCH, 1), generator=generator)
    return tokens[starts + torch.arange(WINDOW + 1)]


def train(model: Any, rate: float, steps: int, minutes: float, path: Path, seed: int = 0) -> None:
    """`steps` steps, or as many as `minutes` allow; the rate rises for 100 steps and falls as a cosine."""
    generator = torch.Generator().manual_seed(seed)
    tokens, held_out = corpus(held_out=False).tokens(), corpus(held_out=True).tokens()
    both, start, step, done, recent = optimizers(model), time.perf_counter(), 0, 0.0, []
    while done < 1:
        step += 1
        done = max(step / steps, (time.perf_counter() - start) / (60 * minutes))
        for optimizer in both:
            falling = 0.505 + 0.495 * math.cos(math.pi * min(1, done))
            optimizer.param_groups[0]["lr"] = rate * min(step / 100, falling)
        piece = draw(tokens, generator)
        logits = model(input_ids=piece[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())
        descend(loss, both)
        recent.append(loss.item())
        if step % 50 == 0 or done >= 1:
            print(f"{step:5d}  {done:4.0%}  loss {mean(recent):.3f}  {time.perf_counter() - start:.0f} s", flush=True)
            recent = []
        if step % 500 == 0 or done >= 1:
            save(model.model, path)
            model.eval()
            print(f"held out: perplexity {perplexity(model, held_out, number=SAMPLE):.2f}", flush=True)
            model.train()


def sizes(name: str, text: Corpus) -> str:
    return f"{name}: {len(text.names)} files, {text.bytes} bytes, {len(text.tokens())} tokens, digest {text.digest}"


def main() -> None:
    """Train, write the weights as float16, and score what was written on all held-out files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--relu", action="store_true", help="the model gated by ReLU, from the other's weights")
    parser.add_argument("--tokenizer", action="store_true", help="train the tokeniser too, which needs new checkpoints")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="when to end at the latest")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--path", type=Path, help="where to write the checkpoint")
    args = parser.parse_args()
    if args.tokenizer or not TOKENIZER.exists():
        train_tokenizer()
    held_out = corpus(held_out=True)
    tokens = held_out.tokens()
    print(sizes("training", corpus(held_out=False)), sizes("held out", held_out), sep="\n", flush=True)
    found = baselines(corpus(held_out=False).tokens(), tokens)
    print(", ".join(f"{name} {each:.1f}" for name, each in found.items()), flush=True)
    torch.manual_seed(args.seed)
    activation = "relu" if args.relu else "silu"
    path = args.path or checkpoint(activation)
    model = build(activation)
    if args.relu:
        model.load_state_dict(load("silu").state_dict())
    train(model, args.rate, args.steps, args.minutes, path, args.seed)
    score = perplexity(load(activation, path), tokens)
    bits = bits_per_byte(score, len(tokens), held_out.bytes)
    print(f"{path.name}, {path.stat().st_size / 1e6:.2f} MB: perplexity {score:.2f}, {bits:.3f} bits per byte")


if __name__ == "__main__":
    main()
