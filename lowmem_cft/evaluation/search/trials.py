"""What a search for a demonstration has scored, in files that are never half written.

P: pairs.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_cft.evaluation.search.demonstrations import Demonstration
from lowmem_cft.evaluation.sts.correlation import Floats, spearman
from lowmem_cft.files import whole_file
from lowmem_cft.model.configs import first_line


@dataclass(frozen=True)
class Trial:
    """A score (Spearman, -1 to 1) with its 95 % interval, and what it is above no demonstration.

    `gain` is paired: the same resamples serve both. `sentence` and `word` are None without a
    demonstration.
    """

    sentence: str | None
    word: str | None
    spearman: float
    low: float
    high: float
    gain: float = 0.0
    gain_low: float = 0.0
    gain_high: float = 0.0

    @property
    def demonstration(self) -> Demonstration | None:
        if self.sentence is None or self.word is None:
            return None
        return Demonstration(self.sentence, self.word)

    def template(self, plain: str) -> str:
        """The template of this trial, given the one without a demonstration."""
        return plain if self.demonstration is None else self.demonstration.before(plain)

    def describe(self) -> str:
        """One line: the score, the gain, the demonstration."""
        score = f"{100 * self.spearman:.2f}"
        if self.sentence is None:
            return f"{score}  without a demonstration"
        return f"{score} ({100 * self.gain:+.2f})  {self.sentence} -> {self.word}"


class TrialFile:
    """`trials.jsonl`: what is searched, then a line for each trial.

    Raises:
        ValueError: the file is of another search, or is damaged.
    """

    def __init__(self, folder: Path, search: Mapping[str, Any]) -> None:
        self.path = folder / "trials.jsonl"
        self.trials: dict[Demonstration | None, Trial] = {}
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"`out`: {folder} is a file; choose another")
        folder.mkdir(parents=True, exist_ok=True)
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        header = {"search": dict(search)}
        if whole:
            self._read(whole, search)
        elif not json.dumps(header).encode().startswith(data):
            raise self._damaged("it has no whole line")
        if len(whole) < len(data):  # cut off in writing
            os.truncate(self.path, len(whole))
        if not whole:
            self._append(header)

    def _read(self, whole: bytes, search: Mapping[str, Any]) -> None:
        try:
            header, *trials = [json.loads(line) for line in whole.splitlines()]
            stored = dict(header["search"])
            for values in trials:
                trial = Trial(**values)
                self.trials[trial.demonstration] = trial
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        for key in {**stored, **search}:
            if stored.get(key) != search.get(key):
                raise ValueError(
                    f"{self.path} is of another search: {key} was {stored.get(key)!r} and is now "
                    f"{search.get(key)!r}; choose another `out`"
                )

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self.path} is no file of a search ({reason}); choose another `out`")

    def add(self, trial: Trial) -> None:
        self._append(asdict(trial))
        self.trials[trial.demonstration] = trial

    def _append(self, values: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(values, ensure_ascii=True) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_plain(path: Path, trial: Trial, gold_P: Floats) -> Floats:
    """The cosines behind the trial without a demonstration.

    Compared with the bytes `save_plain` writes: numpy's own reader answers damage with any exception.

    Raises:
        ValueError: they cannot be read, or are not those of the trial.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"it cannot be read ({first_line(error)})") from error
    alike = _npy(gold_P)
    header = len(alike) - gold_P.nbytes
    if len(data) != len(alike) or data[:header] != alike[:header]:
        raise ValueError(f"it does not hold {len(gold_P)} cosines")
    cosine_P: Floats = np.frombuffer(data, dtype=np.float64, offset=header)
    if not np.isfinite(cosine_P).all() or abs(spearman(cosine_P, gold_P) - trial.spearman) > 1e-12:
        raise ValueError("its cosines are not those that were scored")
    return cosine_P


def _npy(values: Floats) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def save_plain(path: Path, cosine_P: Floats) -> None:
    """Write what `read_plain` reads: whole or not at all."""
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(_npy(cosine_P))
        file.flush()
        os.fsync(file.fileno())
