"""What a pass that runs methods reports: the graph, which method acts at which block, and why not at others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import fx

from tokred.compiler.report import Refusal

__all__ = ["Outcome"]

Block = TypeVar("Block")
Chosen = TypeVar("Chosen")


@dataclass
class Outcome(Generic[Block, Chosen]):
    """The rewritten graph; the method at each block where one acts, in words; and where none could, why."""

    graph: fx.GraphModule
    applied: dict[Block, tuple[Chosen, str]] = field(default_factory=dict)
    refused: dict[Block, tuple[Chosen, Refusal]] = field(default_factory=dict)
