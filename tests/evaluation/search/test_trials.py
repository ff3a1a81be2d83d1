"""The record of a search: a damaged one is noticed, and a half-written line is none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lowmem_cft.evaluation.search import trials
from lowmem_cft.evaluation.search.demonstrations import Demonstration


def test_no_damage_of_the_header_ends_a_search_otherwise(tmp_path: Path) -> None:
    path, gold_P = tmp_path / "plain.npy", np.arange(9.0)
    trial = trials.Trial(None, None, 1.0, 1.0, 1.0)
    trials.save_plain(path, gold_P / 10)
    assert np.array_equal(trials.read_plain(path, trial, gold_P), gold_P / 10)
    data = path.read_bytes()
    header = len(data) - gold_P.nbytes
    bad = [data[:length] for length in range(len(data))]
    bad += [
        data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :] for i in range(header) for bit in (1, 9)
    ]
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="does not hold 9 cosines"):
            trials.read_plain(path, trial, gold_P)


def test_trials_are_read_back_but_for_a_line_that_was_cut_off(tmp_path: Path) -> None:
    demonstration = Demonstration("A jockey riding a horse.", "Equestrian")
    listed = [
        trials.Trial(None, None, 0.5, 0.4, 0.6),
        trials.Trial(demonstration.sentence, demonstration.word, 0.7, 0.6, 0.8, 0.2, 0.1, 0.3),
    ]
    file = trials.TrialFile(tmp_path, {"model": "m"})
    for trial in listed:
        file.add(trial)
    whole = file.path.read_text()
    assert json.loads(whole.splitlines()[0]) == {"search": {"model": "m"}}
    file.path.write_text(whole[:-5])
    again = trials.TrialFile(tmp_path, {"model": "m"})
    assert again.trials == {None: listed[0]}
    again.add(listed[1])
    assert file.path.read_text() == whole
    assert trials.TrialFile(tmp_path, {"model": "m"}).trials == file.trials
    with pytest.raises(ValueError, match="model was 'm' and is now 'n'"):
        trials.TrialFile(tmp_path, {"model": "n"})
