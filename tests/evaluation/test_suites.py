"""What a model is scored on: read and checked first, then reported set by set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowmem_cft.evaluation.sts.sets import load_set
from lowmem_cft.evaluation.suites import StsSuite, TransferSuite, read_suite
from lowmem_cft.evaluation.transfer.score import CONVERGED
from lowmem_cft.inference.embed import Vectors
from made_sets import Lookup, make_task

CPU = torch.device("cpu")


class Lengths:
    """A model that sees a text's length and its number of spaces."""

    float32 = True

    def embed(self, texts: Sequence[str]) -> Vectors:
        return np.array([[len(t), 1 + t.count(" "), 3] for t in texts], dtype=np.float32)


def test_a_report_grows_set_by_set() -> None:
    demo = load_set("demo", None)
    halves = [replace(demo, name=name, pairs=demo.pairs[i::2]) for i, name in enumerate("ab")]
    heard: list[str] = []
    reports = StsSuite(halves, num_resamples=9).score(Lengths(), "m", heard.append)
    first = next(reports)
    assert len(heard) == 1, "the second set is scored only when its report is asked for"
    (last,) = reports
    assert [score.name for score in first.scores] == ["a"]
    assert [score.name for score in last.scores] == ["a", "b"]
    assert last.scores[0] == first.scores[0] != last.scores[1]
    assert last.intervals[0] == first.intervals[0]
    assert (last.model, last.float32, last.num_resamples) == ("m", True, 9)
    assert heard[1] == f"b: {100 * last.scores[1].spearman:.2f}"


def test_transfer_tasks_too() -> None:
    task = make_task({"train": 60, "test": 40})
    vectors = Lookup(task)

    class Model(Lengths):
        def embed(self, texts: Sequence[str]) -> Vectors:
            return vectors(texts)

    suite = TransferSuite([task], replace(CONVERGED, folds=3), False, CPU)
    (report,) = suite.score(Model(), "m", lambda line: None)
    assert report.scores[0].accuracy > 0.5
    assert (report.model, report.float32, suite.normalize) == ("m", True, False)


@pytest.mark.parametrize(
    ("suite", "given", "message"),
    [
        ("glue", {}, "`suite`: got 'glue', wanted sts or transfer"),
        ("transfer", {"resamples": 9}, "`resamples` belongs to `suite` sts"),
        ("transfer", {"mteb_out": Path("m")}, "`mteb_out` belongs to `suite` sts"),
        ("sts", {"solver": "senteval"}, "`solver` belongs to `suite` transfer"),
        ("transfer", {"solver": "sgd"}, "`solver`: got 'sgd', wanted one of senteval, converged"),
        (None, {"limit": 9}, "`limit` belongs to `suite` transfer"),
        (None, {"protocol": "glue"}, "`protocol`: got 'glue', wanted one of mteb, senteval"),
        (None, {"names": ["demo"], "mteb_out": Path("m")}, "needs `protocol` mteb"),
    ],
)
def test_arguments_that_make_no_sense(
    suite: str | None, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_suite(suite, **given)


def test_a_suite_takes_its_protocol() -> None:
    sts = read_suite(None, ["demo"], clean_up=True, resamples=5)
    assert isinstance(sts, StsSuite)
    assert (sts.protocol, sts.cleaned_up, sts.num_resamples) == (None, True, 5)
    assert all(pair.sentence1[-1] in ".'" for pair in sts.sets[0].pairs)
    assert [loaded.name for loaded in sts.sets] == ["demo"]
