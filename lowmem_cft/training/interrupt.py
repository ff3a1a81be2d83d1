"""Ctrl-C that loses no work: the step in hand is finished first."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(RuntimeError):
    """Ctrl-C: the step in work was finished and all is saved."""


@contextmanager
def finish_step_on_interrupt() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) is noted and asked for; the second one stops at once."""
    noted = False

    def note(number: int, frame: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    try:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP"):
            numbers.append(signal.SIGHUP)  # the terminal was closed
        old = {number: signal.signal(number, note) for number in numbers}
    except ValueError:  # not the main thread, where signals do not arrive anyway
        old = {}
    try:
        yield lambda: noted
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
