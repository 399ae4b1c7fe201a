"""The graphs that tokred sees of a model."""

from typing import Any

import torch
from torch import fx

from tokred.compiler.capture import capture


def captured(model: Any, *args: Any, **kwargs: Any) -> list[fx.GraphModule]:
    """The graphs that tokred sees of a model, one for each piece that Dynamo makes."""
    graphs = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
        graphs.append(capture(gm, inputs))
        return gm

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*args, **kwargs)
    return graphs
