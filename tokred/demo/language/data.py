"""The Python standard library's source as text, split by file into training and held-out, and its tokens.

Nothing is downloaded: the files are those of the running interpreter, so another Python has another text. What the
checkpoints were trained and scored on has the `Corpus.digest` in `RECORDED`; of another Python's files a few differ.
Left out are tests, installed packages, what the build generated, and tables and documentation that are no program
(`encodings`, `pydoc_data`). Which part a file belongs to is said by a hash of its name alone, so a file that changed
stays where it was.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["END", "TOKENIZER", "VOCABULARY", "Corpus", "corpus", "decode", "encode", "is_held_out", "windows"]

TOKENIZER = Path(__file__).with_name("tokenizer.json")
VOCABULARY = 4096
END = 0  # the token between two files
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
LEFT_OUT |= {"encodings", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """Some files' names, relative to the library's folder, and texts, sorted by name."""

    names: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(len(text.encode()) for text in self.texts)

    @property
    def digest(self) -> str:
        """Of names and texts, so that two Pythons with the same files have the same."""
        found = hashlib.sha256()
        for name, text in zip(self.names, self.texts, strict=True):
            found.update(name.encode() + b"\0" + text.encode() + b"\0")
        return found.hexdigest()[:16]

    def tokens(self) -> Tensor:
        """All files, `END` in front of each: [T]."""
        return torch.tensor([number for text in self.texts for number in (END, *encode(text))])


def is_held_out(name: str) -> bool:
    """Whether the file `name`, a path relative to the library's folder with slashes, is kept from training: 1 in 16."""
    return hashlib.sha256(name.encode()).digest()[0] < 16


def files(root: Path) -> Iterator[tuple[str, Path]]:
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        generated = path.name.startswith("_sysconfigdata") or any(part.startswith("config-") for part in inside.parts)
        if not generated and not LEFT_OUT & set(inside.parts):
            yield inside.as_posix(), path


@cache
def corpus(held_out: bool, root: Path | None = None) -> Corpus:
    """The held-out files, or the others, of the running interpreter's library (or of a folder like it)."""
    found = sorted(files(root or Path(sysconfig.get_path("stdlib"))))
    chosen = [(name, path.read_text("utf-8", "replace")) for name, path in found if is_held_out(name) == held_out]
    return Corpus(tuple(name for name, _ in chosen), tuple(text for _, text in chosen))


@cache
def tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(TOKENIZER))


def encode(text: str) -> list[int]:
    """The tokens of `text`. Any text can be encoded: the tokeniser knows every byte."""
    ids: list[int] = tokenizer().encode(text).ids
    return ids


def decode(ids: list[int]) -> str:
    """The text that `encode` was given. `END` is left out."""
    text: str = tokenizer().decode(ids)
    return text


def train_tokenizer(path: Path = TOKENIZER) -> None:
    """Byte-pair encoding of the training files (Sennrich et al., arXiv 1508.07909; bytes, as GPT-2 does), as JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(corpus(held_out=False).texts, trainer)
    made.save(str(path), pretty=False)


def windows(tokens: Tensor, number: int, length: int) -> Tensor:
    """`number` pieces [W L + 1] of `tokens` [T], evenly spaced from its start to its end: L to read, one more to say.

    Raises ValueError where `tokens` is shorter than one piece.
    """
    last = len(tokens) - length - 1
    if last < 0:
        raise ValueError(f"a window of {length} tokens and the one behind it do not fit into {len(tokens)}")
    starts = torch.linspace(0, last, number, dtype=torch.float64).long()
    return tokens[starts[:, None] + torch.arange(length + 1)]
