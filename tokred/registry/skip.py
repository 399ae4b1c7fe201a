"""The base of methods that leave whole MLPs or attentions out of a model."""

from __future__ import annotations

from dataclasses import dataclass

from tokred.registry.method import Method

__all__ = ["Skip"]


@dataclass(frozen=True, kw_only=True)
class Skip(Method):
    """A way to do without some blocks: h + MLP(h) becomes h, in prompts and while decoding alike.

    What stands between the block and that sum (a norm behind it, a scale) goes with it. An attention that is left out
    still fills its cache.
    """

    def skips(self, kind: str, layer: int, depth: int, module: str) -> bool:
        """Whether to leave out this "mlp" or "attention". Raises ArgumentError where the options fit no such model."""
        raise NotImplementedError
