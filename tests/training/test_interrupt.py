"""Ctrl-C is noted once, and obeyed at once when it comes again."""

from __future__ import annotations

import os
import signal

import pytest

from lowmem_cft.training.interrupt import finish_step_on_interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_noted_and_the_second_stops(number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    with finish_step_on_interrupt() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), number)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == handler
