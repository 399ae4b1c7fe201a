"""A graph in, a callable out: through Inductor, through AOTAutograd alone, or as it stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

__all__ = ["lower"]


def lower(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    how: str,
    *,
    mode: str | None = None,
    patches: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile `gm`. `patches` and what `mode` stands for are Inductor settings for this compilation alone."""
    if how == "eager":
        _LazyGraphModule.force_recompile(gm)  # its code now: until then `forward` is what writes the code
        return gm.forward
    if how == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        compiled: Callable[..., Any] = aot_eager(gm, example_inputs)
        return compiled
    from torch._inductor.compile_fx import compile_fx

    settings = dict(torch._inductor.list_mode_options(mode)) if mode and mode != "default" else {}
    settings.update(patches or {})
    return cast(Callable[..., Any], compile_fx(gm, example_inputs, config_patches=settings or None))
