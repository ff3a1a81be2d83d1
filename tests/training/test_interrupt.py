"""Ctrl-C is noted once, and obeyed at once when it comes again."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from lowmem_cft.gradient.step import ContrastiveStep
from lowmem_cft.training import job, pipeline
from lowmem_cft.training.interrupt import Interrupted, finish_step_on_interrupt
from lowmem_cft.training.pipeline import run_recipe
from lowmem_cft.training.records import StepLine
from lowmem_cft.training.trainer import Trainer
from running import MakeRecipe, Silent, start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_noted_and_the_second_stops(number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    told: list[str] = []
    with finish_step_on_interrupt(lambda: told.append("finishing")) as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), number)
        assert interrupted()
        assert told == ["finishing"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == handler


def interrupt_at(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt  # what Python makes of the signal

    monkeypatch.setattr(module, name, interrupted)


def test_before_the_first_step_nothing_is_kept(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_recipe()
    interrupt_at(monkeypatch, job, "load_backbone")
    with pytest.raises(Interrupted, match="no step was saved yet"):
        run_recipe(made, Silent())
    assert not (Path(made.output.folder) / "tiny").exists()


def test_after_the_last_step_the_checkpoint_is_kept(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_recipe(train={"steps": 1}, eval={"sets": []})
    with monkeypatch.context() as patch:
        interrupt_at(patch, pipeline, "export_model")
        with pytest.raises(Interrupted, match=r"checkpoint keeps step 1; go on .*`resume`"):
            run_recipe(made, Silent())
    _, metrics = run_recipe(made, Silent(), resume=True)
    assert metrics.export is not None


def test_a_second_interrupt_stops_within_the_step(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_recipe(train={"steps": 5, "save_every": 2}, eval={"sets": []})
    encode = ContrastiveStep.__call__
    calls = []

    def interrupted_twice(self: object, *arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
            assert observer.said[-1].startswith("finishing step 4")
            assert "Ctrl-C again to stop now, which loses it" in observer.said[-1]
            os.kill(os.getpid(), signal.SIGINT)
        return encode(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ContrastiveStep, "__call__", interrupted_twice)
    observer = Silent()
    with pytest.raises(Interrupted, match=r"checkpoint keeps step 2; go on"):
        run_recipe(made, observer)


def test_minutes_without_a_checkpoint_are_few(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    saved = []
    save = Trainer.save

    def spied(self: Trainer) -> None:
        saved.append(self.step_index)
        save(self)

    monkeypatch.setattr(Trainer, "save", spied)

    def four_minutes(line: StepLine) -> None:
        clock[0] += 240

    start(make_recipe(train={"steps": 7}, eval={"sets": []}), Silent(four_minutes)).train()
    assert saved == [3, 6, 7]


def test_a_run_that_was_to_be_replaced_is_not_said_to_be_this_one(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_recipe(train={"steps": 1}, eval={"sets": []}, output={"export": "none"})
    folder, _ = run_recipe(made, Silent())
    interrupt_at(monkeypatch, job, "load_backbone")
    with pytest.raises(Interrupted, match=r"no step was saved yet.*; .*tiny is as it was"):
        run_recipe(made, Silent(), overwrite=True)
    assert folder.metrics.is_file()
