"""Mosaics of scikit-learn's handwritten digits, 45 questions in words, and the words' numbers. Nothing is downloaded.

A mosaic has 5x5 cells of 8x8 pixels, about half of them empty. Mosaics to be scored are made of the held-out digits of
`tokred.demo.data.split()` alone, those to train with of the others.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.demo.data import split

__all__ = ["ANSWERS", "IMAGE", "KINDS", "PATCHES", "QUESTIONS", "Bank", "Question", "Samples", "bank", "samples"]

CELLS, CELL, PATCH = 5, 8, 4  # cells in a row or column, pixels of a cell's and of a patch's side
SIDE = CELLS * CELL
PATCHES = (SIDE // PATCH) ** 2
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PLURALS = ["zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines"]
KINDS = ("which digit is at", "how many", "is there")
# How often a digit is in a mosaic 0, 1, ... 5 times: 1.23 on average, so 12 of 25 cells are taken.
OFTEN = (0.45, 0.2, 0.15, 0.1, 0.07, 0.03)
MOST = 16  # taken cells

SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
OTHERS = ("which", "digit", "is", "in", "row", "column", "how", "many", "are", "there", "a", "an", "yes", "no", "?")
WORDS = (*SPECIAL, *NUMBERS, *PLURALS, *OTHERS)
PAD, BOS, EOS, IMAGE = range(4)
NUMBER = {word: number for number, word in enumerate(WORDS)}


@dataclass(frozen=True)
class Question:
    """One of the 45. `about` is a cell, row by row, or a digit."""

    kind: str
    about: int
    text: str

    @property
    def ids(self) -> list[int]:
        return [NUMBER[word] for word in self.text.split()]


def _questions() -> tuple[Question, ...]:
    where, many, there = KINDS
    cells = ((NUMBERS[row + 1], NUMBERS[column + 1]) for row in range(CELLS) for column in range(CELLS))
    lookups = [f"which digit is in row {row} column {column} ?" for row, column in cells]
    counts = [f"how many {plural} are there ?" for plural in PLURALS]
    existence = [f"is there {'an' if name == 'eight' else 'a'} {name} ?" for name in NUMBERS]
    texts = {where: lookups, many: counts, there: existence}
    return tuple(Question(kind, about, text) for kind in KINDS for about, text in enumerate(texts[kind]))


QUESTIONS = _questions()
ANSWERS = tuple(NUMBER[word] for word in (*NUMBERS, "yes", "no"))


@dataclass(frozen=True)
class Bank:
    """The digits that mosaics are made of. images [R 8 8] in -1..1; rows[d], which of them are digit d."""

    images: Tensor
    rows: tuple[Tensor, ...]

    def pick(self, cells: Tensor, generator: torch.Generator) -> Tensor:
        """Some image of each of `cells` [M], which are digits: [M 8 8]."""
        sizes = torch.tensor([len(rows) for rows in self.rows])[cells]
        which = (torch.rand(len(cells), generator=generator) * sizes).long()
        table = torch.nn.utils.rnn.pad_sequence(list(self.rows), batch_first=True)
        return self.images[table[cells, which]]


@cache
def bank(held_out: bool) -> Bank:
    """The 540 held-out digits, or the 1257 others."""
    from sklearn.datasets import load_digits

    data = load_digits()
    rows = split()[int(held_out)]
    labels = torch.from_numpy(data.target).long()[rows]
    images = torch.from_numpy(data.images).float()[rows] / 8 - 1  # the pixels count to 16
    return Bank(images, tuple((labels == digit).nonzero().flatten() for digit in range(10)))


def arrange(batch: int, generator: torch.Generator) -> Tensor:
    """Which digit is in which cell: [B 25], -1 where there is none."""
    often = torch.multinomial(torch.tensor(OFTEN), batch * 10, replacement=True, generator=generator).view(batch, 10, 1)
    slots = torch.where(torch.arange(5) < often, torch.arange(10)[:, None], -1).flatten(1)  # [B 50], each digit 5 times
    mixed = (torch.rand(slots.shape, generator=generator) + 2 * (slots < 0)).argsort(dim=1)
    cells = slots.gather(1, mixed)[:, : CELLS * CELLS]
    cells[:, MOST:] = -1
    some = torch.randint(10, (batch,), generator=generator)
    cells[:, 0] = torch.where(cells[:, 0] < 0, some, cells[:, 0])  # never a mosaic without any digit
    return cells.gather(1, torch.rand(cells.shape, generator=generator).argsort(dim=1))


def draw(cells: Tensor, digits: Tensor) -> Tensor:
    """The mosaics [B 1 40 40] that have `digits` [M 8 8] in the cells [B 25] that are not empty, in that order."""
    batch = len(cells)
    tiles = torch.full((batch, CELLS * CELLS, CELL, CELL), -1.0)
    tiles[cells >= 0] = digits
    return tiles.view(batch, CELLS, CELLS, CELL, CELL).transpose(2, 3).reshape(batch, 1, SIDE, SIDE)


def answers(cells: Tensor) -> Tensor:
    """The words [B 45] that answer each question; <pad> where an empty cell is asked for."""
    counts = F.one_hot(cells + 1, 11)[:, :, 1:].sum(1)  # [B 10]
    where = torch.where(cells >= 0, NUMBER["zero"] + cells, PAD)
    there = torch.where(counts > 0, NUMBER["yes"], NUMBER["no"])
    return torch.cat([where, NUMBER["zero"] + counts, there], dim=1)


def ask(cells: Tensor, each: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """The numbers [B Q] of some questions to each mosaic: `each` of the three kinds, kind after kind.

    Lookups ask for cells that are taken; counts, and yes or no, are drawn so that each possible answer is as likely.
    """
    table = answers(cells)
    chosen, first = [], 0
    for kind, number in zip(KINDS, each, strict=True):
        size = sum(question.kind == kind for question in QUESTIONS)
        right = table[:, first : first + size]
        if kind == KINDS[0]:
            weights = (right != PAD).float()
        else:
            weights = 1 / (right[:, :, None] == right[:, None]).sum(-1)
        chosen.append(first + torch.multinomial(weights, number, replacement=True, generator=generator))
        first += size
    return torch.cat(chosen, dim=1)


@dataclass(frozen=True)
class Samples:
    """Pairs of a mosaic and a question, as a transformers model takes them. Prompts are padded on the left.

    pixel_values [S 1 40 40], input_ids and attention_mask [S L], answer [S] a word, kind [S] a number in KINDS
    """

    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    answer: Tensor
    kind: Tensor

    def inputs(self, part: slice = slice(None)) -> dict[str, Tensor]:
        names = ("input_ids", "attention_mask", "pixel_values")
        return {name: getattr(self, name)[part] for name in names}

    def __len__(self) -> int:
        return len(self.answer)


def prompts(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """<bos>, the image's tokens, the question: input_ids and attention_mask [S L] of questions [S]."""
    texts = [[BOS, *[IMAGE] * PATCHES, *QUESTIONS[number].ids] for number in numbers.tolist()]
    length = max(len(question.ids) for question in QUESTIONS) + 1 + PATCHES
    ids = torch.tensor([[PAD] * (length - len(text)) + text for text in texts])
    return ids, (ids != PAD).long()


def samples(mosaics: int, seed: int = 0, held_out: bool = True) -> Samples:
    """One question of each kind to each of `mosaics` mosaics, the kinds in turn: 3 * `mosaics` samples."""
    generator = torch.Generator().manual_seed(seed)
    cells = arrange(mosaics, generator)
    images = draw(cells, bank(held_out).pick(cells[cells >= 0], generator))
    numbers = ask(cells, (1, 1, 1), generator)
    ids, mask = prompts(numbers.flatten())
    right = answers(cells).gather(1, numbers).flatten()
    return Samples(images.repeat_interleave(3, dim=0), ids, mask, right, torch.arange(3).repeat(mosaics))
