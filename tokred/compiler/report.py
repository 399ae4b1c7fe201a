"""What the compiler found, did and refused: plain data, printable, with the JSON schema that the README documents."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["BlockReport", "GraphReport", "PassReport", "Refusal", "Report", "TokenPicture"]


@dataclass(frozen=True)
class Refusal:
    """Not here, because: a stable code, a sentence, and where (module, user's file and line, or node)."""

    code: str
    reason: str
    where: str = ""


@dataclass
class BlockReport:
    """One attention or MLP block: where it is, what was done to it, and what that does to its tokens."""

    kind: Literal["attention", "mlp"]
    layer: int
    module: str
    tokens: tuple[int | str, int | str]  # before, after; a str where a length is symbolic
    form: str = ""  # "self", "cross", "plain", "gated", ...
    source: str = ""  # the user's file and line
    method: str | None = None
    refusal: Refusal | None = None
    flops: tuple[int, int] = (0, 0)  # before, after
    note: str = ""  # "predicted gain 1.2 ms for 0.3 ms", "restored here for conv2d", ...


@dataclass
class PassReport:
    """One pass over one graph: how many places it changed, and what it says about them."""

    name: str
    exact: bool
    changes: int
    seconds: float
    lines: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


@dataclass
class TokenPicture:
    """Which original tokens live on together after one site, for the first sample of the batch that `explain` ran."""

    layer: int
    method: str
    groups: list[int]  # [N] the output token that each original token is part of, -1 where it was dropped
    protected: tuple[int, int]  # tokens at the head and at the tail that are no patches
    grid: tuple[int, int] | None  # rows and columns of the patches, where the graph shows them


@dataclass
class GraphReport:
    """One compiled graph (one piece of the model, if Dynamo broke it)."""

    model: str
    blocks: list[BlockReport] = field(default_factory=list)
    passes: list[PassReport] = field(default_factory=list)
    flops: tuple[int, int] = (0, 0)
    restores: list[str] = field(default_factory=list)  # one line for each place that needed the full tokens
    notes: list[str] = field(default_factory=list)
    pictures: list[TokenPicture] = field(default_factory=list)
    image: Any = None  # [H, W, 3] floats in 0..1, the input of the pictures, if the model reads images
    before: str = ""  # the captured graph as text
    after: str = ""  # the rewritten graph as text


@dataclass
class Report:
    """All graphs of one `explain`, or of everything compiled since `tokred.reset()`."""

    graphs: list[GraphReport] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The documented schema; plain dicts, lists, strings and numbers."""
        return {"graphs": [_graph_json(graph) for graph in self.graphs]}

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained HTML file (blocks before and after, refusals, token pictures); returns its path."""
        from tokred.compiler.html import write_html

        return write_html(self, Path(path))

    def __str__(self) -> str:
        from tokred.compiler.text import report_text

        return report_text(self)


def _graph_json(graph: GraphReport) -> dict[str, Any]:
    before, after = graph.flops
    return {
        "model": graph.model,
        "blocks": [_block_json(block) for block in graph.blocks],
        "flops": {"before": before, "after": after},
    }


def _block_json(block: BlockReport) -> dict[str, Any]:
    refusal = block.refusal
    return {
        "kind": block.kind,
        "layer": block.layer,
        "module": block.module,
        "tokens": list(block.tokens),
        "method": block.method,
        "refusal": None if refusal is None else asdict(refusal),
    }
