"""What a prompt chose, from its graph to the graphs that decode behind it, which Dynamo makes apart.

A `Request` belongs to a cache: tokred.generation keeps the two together, so that each decoding call finds what the
prompt in its own cache voted for, however calls are interleaved, and a cache that no compiled prompt filled has none.
It holds votes, which are small. The weights of the neurons that they choose are gathered into buffers, one for each
parameter and thread, when a decoding call first needs them, and again for another request, more votes, or a parameter
that changed. They stay at their addresses, which CUDA graphs remember.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from torch import Tensor

from tokred.compiler.extras import Extra

__all__ = ["Choice", "Gathered", "Key", "Request", "Turn", "Votes", "serving"]

Key = tuple[str, str, int]  # the method, the name of the parameter that reads the neurons, and its layer


@dataclass(eq=False)
class Request:
    """votes   [F] of each MLP, added up over all graphs that the prompt went through
    change     how often they changed
    """

    votes: dict[Key, Tensor]
    change: int = 0


class Turn:
    """One call of the model, and its request: None if the cache knows none. A prompt starts a new one."""

    def __init__(self, request: Request | None):
        self.request, self.begun = request, False

    def vote(self, keys: Sequence[Key], votes: Sequence[Tensor], *, begins: bool) -> None:
        """Count the votes of one graph. `begins`: there was nothing before it, else it goes on behind a cache."""
        if begins and not self.begun:
            self.request, self.begun = Request({}), True
        if self.request is None:
            return
        own = self.request.votes
        for key, more in zip(keys, votes, strict=True):
            if key in own:
                own[key] = own[key] + more
            elif self.begun:
                own[key] = more.clone()  # a CUDA graph would write into its results again
        self.request.change += 1


_local = threading.local()


@contextmanager
def serving(turn: Turn) -> Iterator[None]:
    """Inside, compiled graphs belong to this call of the model."""
    outer, _local.turn = getattr(_local, "turn", None), turn
    try:
        yield
    finally:
        _local.turn = outer


def _turn() -> Turn | None:
    found: Turn | None = getattr(_local, "turn", None)
    return found


class Votes(Extra):
    """Results of a prompt's graph: [F] for each MLP."""

    def __init__(self, keys: Sequence[Key], *, begins: bool):
        self.keys, self.begins = list(keys), begins
        self.results = len(self.keys)

    def take(self, own: Sequence[Any], more: Sequence[Any]) -> None:
        if (turn := _turn()) is not None:
            turn.vote(self.keys, more, begins=self.begins)


@dataclass(frozen=True)
class Choice:
    """One input: the rows (or along `dim`) `start` + neuron of a parameter for the `count` neurons with most votes.

    number   the graph's input that is the parameter; None for a mask [F] that is True for these neurons
    """

    key: Key
    count: int
    number: int | None = None
    dim: int = 0
    start: int = 0


class Gathered(Extra):
    """Inputs of decoding graphs: for each of `choices` what the neurons that the request chose have."""

    stays = True

    def __init__(self) -> None:
        self.choices: list[Choice] = []
        self._local = threading.local()

    def ready(self) -> bool:
        turn = _turn()
        votes = None if turn is None or turn.request is None else turn.request.votes
        return votes is not None and all(choice.key in votes for choice in self.choices)

    def give(self, inputs: Sequence[Any]) -> list[Tensor]:
        turn = _turn()
        assert turn is not None and turn.request is not None
        buffers: list[_Buffer | None] = self._local.__dict__.setdefault("buffers", [None] * len(self.choices))
        given = []
        for place, choice in enumerate(self.choices):
            parameter = None if choice.number is None else inputs[choice.number]
            buffer = buffers[place]
            if buffer is None or not buffer.fits(parameter, turn.request):
                buffer = buffers[place] = _Buffer.filled(choice, parameter, turn.request)
            given.append(buffer.values)
        return given


class _Buffer:
    """What one Choice has of a request, in this thread. Graphs that choose alike share it."""

    _all: ClassVar[WeakValueDictionary[tuple[Any, ...], _Buffer]] = WeakValueDictionary()

    def __init__(self, parameter: Tensor | None) -> None:
        self.parameter: ReferenceType[Tensor] | None = None if parameter is None else ref(parameter)
        self.values = torch.empty(0)
        self.request: Request | None = None
        self.change, self.version, self.address = -1, -1, 0

    @staticmethod
    def filled(choice: Choice, parameter: Tensor | None, request: Request) -> _Buffer:
        key = (threading.get_ident(), id(parameter), choice)
        buffer = _Buffer._all.get(key)
        if buffer is None or not buffer.of(parameter):
            buffer = _Buffer._all[key] = _Buffer(parameter)
        if not buffer.fits(parameter, request):
            buffer._fill(choice, parameter, request)
        return buffer

    def of(self, parameter: Tensor | None) -> bool:
        return parameter is None if self.parameter is None else self.parameter() is parameter

    def fits(self, parameter: Tensor | None, request: Request) -> bool:
        """Whether this is what the request chose of the parameter as it is now."""
        if self.request is not request or self.change != request.change:
            return False
        if parameter is None:
            return True
        own = self.of(parameter)
        return own and parameter._version == self.version and parameter.data_ptr() == self.address

    def _fill(self, choice: Choice, parameter: Tensor | None, request: Request) -> None:
        """Gather anew, into the same memory where it fits; nothing here waits for the device."""
        votes = request.votes[choice.key]
        with torch.inference_mode(False), torch.no_grad():
            best = votes.argsort(descending=True, stable=True)[: choice.count]
            if parameter is None:
                now = torch.zeros_like(votes, dtype=torch.bool).index_fill_(0, best, True)
            else:
                best = best.sort().values + choice.start  # as they lie in memory
                now = parameter.detach().index_select(choice.dim, best)
                self.version, self.address = parameter._version, parameter.data_ptr()
            if (now.shape, now.dtype, now.device) == (self.values.shape, self.values.dtype, self.values.device):
                self.values.copy_(now)
            else:
                self.values = now
        self.request, self.change = request, request.change
