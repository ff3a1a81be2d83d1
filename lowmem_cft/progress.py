"""Who is told how work goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Say = Callable[[str], None]
"""Takes one line for people."""


class Says(Protocol):
    """Passes a line on to the user."""

    def say(self, text: str) -> None: ...


class Counts(Says, Protocol):
    """Also shows how much of some work is done."""

    def begin(self, num_steps: int, done: int, what: str = ...) -> None: ...

    def advance(self, count: int) -> None: ...
