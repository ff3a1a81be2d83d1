"""A list of stages: none is done twice, none on other inputs, none before what it needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowmem_cft.files import digest
from lowmem_cft.papers import records
from lowmem_cft.papers.records import Records
from lowmem_cft.papers.results import Transfer
from lowmem_cft.papers.stages import Effort, Stage, run_stages
from running import Heard


def result_of(name: str) -> Transfer:
    return Transfer(model=name, tasks=[])


class Bench:
    """Two stages, the second on the first's result, and how often each was done."""

    def __init__(self, folder: Path) -> None:
        self.records, self.done = Records(folder), list[str]()
        self.inputs: dict[str, dict[str, Any]] = {"first": {"a": {"b": 1}}, "second": {"c": 2}}

    def stage(self, name: str, needs: tuple[str, ...] = ()) -> Stage:
        def work(observer: Any) -> Transfer:
            self.done.append(name)
            return result_of(name)

        return Stage(
            name,
            "transfer",
            f"the {name}",
            lambda: self.inputs[name],
            work,
            needs,
            lambda: Effort(3.0, 0),
        )

    def run(
        self, *, redo: tuple[str, ...] = (), done: Callable[[], object] = lambda: None
    ) -> Heard:
        heard = Heard()
        stages = [self.stage("first"), self.stage("second", ("first",))]
        run_stages(stages, self.records, heard, redo=redo, done=done)
        return heard


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_each_is_done_once(bench: Bench) -> None:
    reports: list[int] = []
    bench.run(done=lambda: reports.append(len(bench.done)))
    assert bench.done == ["first", "second"]
    assert reports == [1, 2]
    heard = bench.run()
    assert bench.done == ["first", "second"]
    assert [text.endswith("done before") for text in heard.said] == [True, True]


def test_a_record_says_what_it_rests_on(bench: Bench) -> None:
    bench.run()
    first, second = bench.records.get("first"), bench.records.get("second")
    assert first is not None
    assert second is not None
    assert first.inputs == {"a": {"b": 1}, "needs": {}}
    assert first.inputs_sha256 == digest(first.inputs)
    assert second.inputs["needs"] == {"first": first.inputs_sha256}
    assert second.result == result_of("second")
    assert second.flops == 3.0


def test_order_of_keys_does_not_count() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_what_fails_is_done_again(bench: Bench) -> None:
    second = bench.stage("second", ("first",))

    def fails(observer: Any) -> Transfer:
        raise RuntimeError("power")

    broken = Stage("second", "transfer", "", second.inputs, fails, second.needs)
    with pytest.raises(RuntimeError, match="power"):
        run_stages([bench.stage("first"), broken], bench.records, Heard())
    bench.run()
    assert bench.done == ["first", "second"]


def test_other_inputs_are_refused_before_any_work(bench: Bench) -> None:
    bench.run()
    bench.inputs |= {"second": {"c": 7}, "third": {}}
    listed = [bench.stage("third"), bench.stage("first"), bench.stage("second", ("first",))]
    with pytest.raises(ValueError, match=r"c was 2, is 7.*`redo` second"):
        run_stages(listed, bench.records, Heard())
    assert bench.done == ["first", "second"]
    bench.run(redo=("second",))
    assert bench.done == ["first", "second", "second"]


def test_anew_forgets_what_was_there(bench: Bench) -> None:
    bench.run()
    forgotten: list[bool] = []

    def forget() -> None:
        forgotten.append(bench.records.path("first").is_file())

    first = replace(bench.stage("first"), forget=forget)
    run_stages([first], bench.records, Heard())
    assert forgotten == []
    run_stages([first], bench.records, Heard(), redo=["first"])
    assert forgotten == [True]
    with pytest.raises(ValueError, match=r"`redo`: got 'frist', wanted one of first"):
        run_stages([first], bench.records, Heard(), redo=["frist"])


def test_seconds_of_stopped_tries_count(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(records.time, "perf_counter", lambda: now[0])

    def takes(seconds: float, error: bool) -> Stage:
        def work(observer: Any) -> Transfer:
            now[0] += seconds
            if error:
                raise KeyboardInterrupt
            return result_of("first")

        return replace(bench.stage("first"), work=work)

    for seconds in (5.0, 7.0):
        with pytest.raises(KeyboardInterrupt):
            run_stages([takes(seconds, True)], bench.records, Heard())
    run_stages([takes(1.0, False)], bench.records, Heard())
    record = bench.records.get("first")
    assert record is not None
    assert record.seconds == 13.0
    run_stages([takes(2.0, False)], bench.records, Heard(), redo=["first"])
    again = bench.records.get("first")
    assert again is not None
    assert again.seconds == 2.0


def test_a_change_reaches_what_needs_it(bench: Bench) -> None:
    bench.run()
    bench.inputs["first"] = {"a": {"b": 2}}
    with pytest.raises(ValueError, match=r"a\.b was 1, is 2"):
        bench.run()
    with pytest.raises(ValueError, match=r"second\.json.*needs\.first"):
        bench.run(redo=("first",))
    assert bench.done == ["first", "second", "first"]
    bench.run(redo=("second",))
    assert bench.run().said[0].endswith("done before")


def test_what_is_needed_is_named(bench: Bench) -> None:
    with pytest.raises(ValueError, match=r"stage second needs first: .*`stages` first"):
        run_stages([bench.stage("second", ("first",))], bench.records, Heard())
    assert bench.done == []


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"result": 1}), "\xff"])
def test_a_damaged_record_is_named(bench: Bench, text: str) -> None:
    bench.run()
    bench.records.path("first").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"first\.json.*remove it"):
        bench.run()


def test_damaged_seconds_are_named(bench: Bench) -> None:
    bench.records.stages.mkdir(parents=True)
    file = bench.records.stages / "first.seconds"
    file.write_text("soon")
    with pytest.raises(ValueError, match=r"first\.seconds: wanted seconds .*'soon'.* remove it"):
        bench.run()
    assert bench.done == []
    file.unlink()
    bench.run()
    assert bench.done
