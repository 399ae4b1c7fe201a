"""placeholder"""
from typing import Any


class Costs:
    def __init__(self, captured: Any, final: Any): ...
    def totals(self) -> tuple[int, int]:
        return (0, 0)
    def block(self, module: str) -> tuple[int, int]:
        return (0, 0)


class Gate:
    def __init__(self, *a: Any, refuse: bool): ...
    def __call__(self, *a: Any) -> None:
        return None
