"""An observer that shows nothing passes on what is said."""

from __future__ import annotations

from lowmem_cft.progress import Quiet
from lowmem_cft.training.records import StepLine


def test_quiet_passes_on_what_is_said_and_nothing_else() -> None:
    said: list[str] = []
    quiet = Quiet(said.append)
    quiet.say("one line")
    quiet.begin(3, 0)
    quiet.advance(1)
    quiet.step(StepLine(step=1, loss=0.5))
    quiet.scored(1, [])
    assert said == ["one line"]
    Quiet().say("to nobody")
