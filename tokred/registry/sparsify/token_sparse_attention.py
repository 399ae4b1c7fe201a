"""Token Sparse Attention: in a long prefill each head attends among the tokens that its last queries look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tokred.backends.kernels.token_sparse import expected_rows, token_sparse_attention
from tokred.errors import ArgumentError
from tokred.registry.attention import AttentionRewrite, Effort
from tokred.registry.method import check_flag, check_int
from tokred.registry.register import register


@register("sparsify", "token_sparse_attention")
@dataclass(frozen=True)
class TokenSparseAttention(AttentionRewrite):
    """Attend, in each head, among the tokens that the prompt's last queries look at; the others get no update there.

    Jo, Kang, Song, Kim: "Token Sparse Attention: Efficient Long-Context Inference with Interleaved Token Selection",
    2026, arXiv 2602.03216. Tokens outside keep their residual and their keys in the cache; decoding is dense. As in the
    released code the last queries' probabilities, averaged, are smoothed over neighbours, a layer's mean over its heads
    says how many stay, and each head takes its own best; but what is dropped stays below `coverage` (the code drops one
    token more), and padding and batches are understood: each sample chooses among its own tokens.

    coverage  attention mass that a layer may leave out; 0 leaves nothing out
    window    how many of the last queries score the others; they always stay
    least     how many others stay at least
    kernel    over how many neighbours scores are averaged, an odd number
    grouped   whether query heads that share a key head choose together, so that grouped keys are not copied. False is
              the released code's way
    layers    None is the upper half; the paper takes those whose hidden states drift least (15 to 30 of Llama 3.1 8B).
              A layer of which only the last token is read stays dense: it is cheap
    """

    coverage: float = 0.005
    window: int = 128
    least: int = 1024
    kernel: int = 7
    grouped: bool = False

    assumes: ClassVar[str] = "if half of the tokens attend, an assumption; how many do shows when it runs"

    def __post_init__(self) -> None:
        number = isinstance(self.coverage, (int, float)) and not isinstance(self.coverage, bool)
        if not number or not 0 <= self.coverage < 1:
            raise ArgumentError(f"{self.name}(coverage={self.coverage!r}): the mass left out must lie in [0, 1)")
        for name, lowest in (("window", 1), ("least", 1), ("kernel", 1)):
            check_int(self.name, name, getattr(self, name), lowest)
        if self.kernel % 2 == 0:
            raise ArgumentError(f"{self.name}(kernel={self.kernel!r}): an odd number of neighbours")
        check_flag(self.name, "grouped", self.grouped)

    def default_layers(self, depth: int) -> list[int]:
        return list(range(depth // 2, depth))

    @property
    def shortest(self) -> int | None:
        return self.window + self.least + 1 if self.coverage > 0 else None

    def effort(self, tokens: int, channels: int) -> Effort:
        rows = expected_rows(tokens, self.window, self.least)
        scored = self.window * tokens
        # the scores and their softmax, twice each; the sorts; q, k, v gathered, the result scattered into zeros
        moved = 6 * scored + 40 * tokens + (8 * rows + tokens) * channels
        return Effort(rows * (rows + 1) / 2, scored, moved, kernels=40)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: Any) -> Tensor:
        options = (float(self.coverage), self.window, self.least, self.kernel, self.grouped)
        attended: Tensor = token_sparse_attention(query, key, value, mask, scale, *options)
        return attended
