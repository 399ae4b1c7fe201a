"""Multi-query associative recall: pairs of a key and a value, then keys whose values are asked for; and a model.

The task is Arora, Eyuboglu, Timalsina, Johnson, Poli, Zou, Rudra, Ré: "Zoology: Measuring and Improving Recall in
Efficient Language Models", ICLR 2024, arXiv 2312.04927, section 4 and appendix on synthetics, generated here. As there
every key is asked for once, at gaps that follow a power law. Unlike there the pairs are scattered over a context that
is mostly filler, so that a method that drops tokens has something to choose; the filler has words of its own.

`python -m tokred.demo.language.recall` trains the checkpoint, a Llama of two layers; 950 seconds with a fifth of a
core. The last line of the run that made the one that comes with tokred:

    recall.safetensors, 0.28 MB: recall 1.000
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.demo.language.score import Model
from tokred.demo.mosaic.train import descend, optimizers, save

__all__ = ["CHECKPOINT", "CONTEXT", "LENGTH", "PAIRS", "Pairs", "build", "example", "load", "pairs", "recall"]

CHECKPOINT = Path(__file__).with_name("recall.safetensors")
CONTEXT, LENGTH = 40, 64  # rows of the context, where the pairs are, and of it and the questions together
PAIRS = 8
KEYS, VALUES, FILLER = range(48), range(48, 96), range(96, 128)
CONFIG: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
    "attention_bias": True,  # attention to the token before is learned in half the time
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Pairs:
    """input_ids [S 64]; where [S P], the rows that ask; value [S P], the right words there."""

    input_ids: Tensor
    where: Tensor
    value: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


def pairs(
    samples: int,
    seed: int | torch.Generator = 0,
    number: int = PAIRS,
    context: int = CONTEXT,
    length: int = LENGTH,
) -> Pairs:
    """`samples` sequences of `number` pairs in the first `context` of `length` rows, each asked for once behind."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed

    def some(of: int) -> Tensor:  # `number` different ones of `of`, in any order: [S P]
        return torch.rand(samples, of, generator=generator).argsort(dim=1)[:, :number]

    keys, values = KEYS.start + some(len(KEYS)), VALUES.start + some(len(VALUES))
    ids = torch.randint(FILLER.start, FILLER.stop, (samples, length), generator=generator)
    told = 2 * some(context // 2)
    gaps = torch.arange(1, (length - context) // 2 + 1) ** -0.99  # Zoology's a * i^(a - 1), a = 0.01
    asked = torch.multinomial(gaps.expand(samples, -1), number, generator=generator)
    asked = context + 2 * asked.gather(1, some(number))  # else what was told first tends to be asked first
    for where in (told, asked):
        ids.scatter_(1, where, keys).scatter_(1, where + 1, values)
    return Pairs(ids, asked, values)


@torch.no_grad()
def recall(model: Model, data: Pairs, batch: int = 50) -> float:
    """The fraction of questions whose most likely next word, of all words, is the right value.

    Where `batch` does not divide the number of samples the last call is smaller.
    """
    hits = 0
    for start in range(0, len(data), batch):
        part = slice(start, start + batch)
        said = model(input_ids=data.input_ids[part], use_cache=False).logits.argmax(-1)
        hits += int((said.gather(1, data.where[part]) == data.value[part]).sum())
    return hits / data.value.numel()


def build() -> Any:
    """The model with random weights."""
    import transformers as hf

    return hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG))


def load(path: Path = CHECKPOINT) -> Any:
    """The trained model in eval mode, float32 (the file holds float16, to stay small)."""
    from safetensors.torch import load_file

    model = build()
    model.model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval()


def example(batch: int = 8) -> tuple[Any, tuple[()], dict[str, Tensor]]:
    """The trained model and some sequences: `tokred explain tokred.demo.language.recall:example`."""
    return load(), (), {"input_ids": pairs(batch).input_ids}


def lesson(done: float, generator: torch.Generator) -> Pairs:
    """What to learn from when `done` of the training, 0 to 1, is over: three pairs without filler, then ever more.

    Of sequences as long as those that are scored nothing was learned in a thousand steps but which values are left.
    """
    grown = min(1, max(0, 3 * done - 1))
    most, told, asked = (3 + round(grown * (full - 3)) for full in (PAIRS, CONTEXT // 2, (LENGTH - CONTEXT) // 2))
    number = int(torch.randint(3, most + 1, (), generator=generator))
    return pairs(64 if grown == 0 else 32, generator, number, 2 * told, 2 * (told + asked))


def train(model: Any, rate: float, steps: int, path: Path, seed: int = 0) -> None:
    """The loss is that of the answers alone. The rate rises for 50 steps and falls as a cosine."""
    generator, scored = torch.Generator().manual_seed(seed), pairs(200, seed=1)
    both, start, recent = optimizers(model), time.perf_counter(), []
    for step in range(1, steps + 1):
        for optimizer in both:
            falling = 0.505 + 0.495 * math.cos(math.pi * step / steps)
            optimizer.param_groups[0]["lr"] = rate * min(step / 50, falling)
        data = lesson(step / steps, generator)
        hidden = model.model(input_ids=data.input_ids, use_cache=False).last_hidden_state
        rows = hidden.gather(1, data.where[:, :, None].expand(-1, -1, hidden.shape[-1]))
        loss = F.cross_entropy(model.lm_head(rows).flatten(0, 1), data.value.flatten())
        descend(loss, both)
        recent.append(loss.item())
        if step % 100 == 0 or step == steps:
            score = recall(model, scored)
            print(
                f"{step:5d}  loss {mean(recent):.3f}  recall {score:.3f}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            recent = []
    save(model.model, path)


def main() -> None:
    """Train, write the weights as float16, and score what was written."""
    parser = argparse.ArgumentParser(description="Train the recall model's checkpoint.")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--path", type=Path, default=CHECKPOINT)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = build()
    train(model, args.rate, args.steps, args.path, args.seed)
    score = recall(load(args.path), pairs(500, seed=2))
    print(f"{args.path.name}, {args.path.stat().st_size / 1e6:.2f} MB: recall {score:.3f}")


if __name__ == "__main__":
    main()
