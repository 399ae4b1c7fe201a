"""Time functions against each other, interleaved, so that a busy moment of the machine hits all of them."""

import time
from collections.abc import Callable, Mapping
from statistics import median

__all__ = ["interleaved"]


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = 11,
    tick: Callable[[], object] | None = None,
) -> dict[str, float]:
    """The median seconds of each function over `rounds` rounds; a round calls each once, every other one backwards.

    Each function is called once before the clock starts, so compilation and first touches are not timed.
    On CUDA the device is synchronised around each call. `tick` is called after each round (a progress bar).
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    wait = _synchronize()
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            wait()
            start = time.perf_counter()
            functions[name]()
            wait()
            seconds[name].append(time.perf_counter() - start)
        if tick is not None:
            tick()
    return {name: median(values) for name, values in seconds.items()}


def _synchronize() -> Callable[[], None]:
    import torch

    return torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
