"""Ctrl-C that loses no work: the step in hand is finished first."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(RuntimeError):
    """Ctrl-C: the message says what is kept, and how to go on."""


@contextmanager
def interrupts_say(kept: Callable[[], str]) -> Iterator[None]:
    """Turn a Ctrl-C in the block into `Interrupted`, with what is kept as its message."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(kept()) from None


@contextmanager
def finish_step_on_interrupt(announce: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Let the step in work finish on the first Ctrl-C, SIGTERM or SIGHUP; stop at once on the second.

    Args:
        announce: called on the first one, to tell the user what happens.

    Yields:
        A function that says whether there was one.

    Raises:
        KeyboardInterrupt: the second one.
    """
    noted = False

    def note(number: int, frame: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True
        announce()

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
