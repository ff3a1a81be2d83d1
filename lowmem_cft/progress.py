"""Who is told how work goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

Say = Callable[[str], None]
"""Shows the user one line of text."""


class Says(Protocol):
    """Shows the user one line of text."""

    def say(self, text: str) -> None: ...


class Counts(Says, Protocol):
    """Also shows how much of some work is done."""

    def begin(self, num_steps: int, done: int, what: str = ...) -> None: ...

    def advance(self, count: int) -> None: ...


class Quiet:
    """Shows nothing; what is said goes to `say`, if anybody listens."""

    def __init__(self, say: Say = lambda text: None) -> None:
        self._say = say

    def say(self, text: str) -> None:
        self._say(text)

    def begin(self, num_steps: int, done: int, what: str = "") -> None:
        """Show nothing."""

    def advance(self, count: int) -> None:
        """Show nothing."""

    def step(self, line: Any) -> None:
        """Show nothing."""

    def scored(self, step: int, scores: Any) -> None:
        """Show nothing."""
