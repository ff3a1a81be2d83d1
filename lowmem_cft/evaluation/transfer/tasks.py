"""The seven transfer tasks: which files they are, how they are read, what SentEval makes of them.

The rows come out as SentEval (facebookresearch/SentEval) hands them to its classifier: tokens
joined by one blank, sorted by number of tokens and class. The order counts, since it decides which
rows share a fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lowmem_cft.data.columns import DataError, require
from lowmem_cft.data.formats import BadRow, tables
from lowmem_cft.files import sha256_of

SOURCE = "https://github.com/facebookresearch/SentEval, data/downstream/get_transfer_data.bash"


@dataclass(frozen=True)
class TaskSpec:
    """A task's files and sizes.

    Its splits say how it is scored: `all` by nested cross-validation, `train` and `test` with
    cross-validation on the former, `train`, `dev` and `test` as they stand.
    """

    name: str
    splits: dict[str, int]
    """Rows of each split."""
    classes: tuple[str, ...] = ("0", "1")
    """Labels in the file, in SentEval's order of classes."""
    pairs: bool = False
    removed: str = ""
    """Characters that SentEval's preparation deletes."""

    def file(self, split: str) -> str:
        """Path of a split relative to the data folder."""
        suffix = "" if split == "all" else f"-{split}"
        return f"{self.name}/{self.name}{suffix}.tsv"

    @property
    def columns(self) -> list[str]:
        return ["label", "text", "text2"] if self.pairs else ["label", "text"]


SPECS = {
    spec.name: spec
    for spec in (
        TaskSpec("MR", {"all": 10662}),
        TaskSpec("CR", {"all": 3771}),
        # "1" marks subjective sentences; SentEval counts the objective ones as its class 1
        TaskSpec("SUBJ", {"all": 10000}, classes=("1", "0")),
        TaskSpec("MPQA", {"all": 10603}),
        TaskSpec("SST2", {"train": 67349, "dev": 872, "test": 1821}),
        TaskSpec(
            "TREC",
            {"train": 5452, "test": 500},
            classes=("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"),
            removed="'`",
        ),
        TaskSpec("MRPC", {"train": 4076, "test": 1725}, pairs=True),
    )
}


@dataclass(frozen=True)
class Split:
    """Rows in SentEval's order; `texts2` are the second sentences of a pair task."""

    texts: list[str]
    texts2: list[str]
    label_N: npt.NDArray[np.int64]
    """Class numbers, 0 to num_classes - 1."""


@dataclass(frozen=True)
class TransferTask:
    """`checksums` are the sha256 of the files read; `limit` is what they were cut to, if at all."""

    spec: TaskSpec
    splits: dict[str, Split]
    checksums: dict[str, str]
    limit: int | None = None

    @property
    def name(self) -> str:
        return self.spec.name


def load_tasks(
    folder: Path | None, names: Sequence[str], *, limit: int | None = None
) -> list[TransferTask]:
    """Read tasks from the data folder.

    Args:
        folder: holds `MR/MR.tsv`, `TREC/TREC-train.tsv` and so on.
        names: keys of `SPECS`.
        limit: keep at most this many rows of each split, evenly spaced over the file (which lists
            one class after the other). Results are then no longer the protocol's.

    Raises:
        ValueError: no folder, an unknown, repeated or missing task, a limit below 1.
        DataError: a row is wrong, or a file's size is not the protocol's.
    """
    repeated = [name for name in SPECS if list(names).count(name) > 1]
    if repeated:
        raise ValueError(f"transfer task {repeated[0]}: named twice; name each task once")
    unknown = [name for name in names if name not in SPECS]
    if unknown:
        raise ValueError(f"transfer task {unknown[0]!r}: none of {', '.join(SPECS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, wanted at least 1 row")
    specs = [SPECS[name] for name in names]
    if folder is None:
        files = ", ".join(spec.file(split) for spec in specs for split in spec.splits)
        raise ValueError(f"transfer tasks: set LOWMEM_CFT_DATA to the folder that holds {files}")
    missing = [file for spec in specs for file in _missing(spec, folder)]
    if missing:
        raise ValueError(
            f"transfer tasks: {folder} lacks {', '.join(missing)}; make them from SentEval's data "
            f"({SOURCE}) as tab-separated files with a header, columns label and text (MRPC: and "
            "text2)"
        )
    return [_load(spec, folder, limit) for spec in specs]


def _missing(spec: TaskSpec, folder: Path) -> list[str]:
    return [file for split in spec.splits if not (folder / (file := spec.file(split))).is_file()]


def _load(spec: TaskSpec, folder: Path, limit: int | None) -> TransferTask:
    splits, checksums = {}, {}
    for split, num_rows in spec.splits.items():
        file = folder / spec.file(split)
        rows = _read(spec, file)
        if len(rows) != num_rows:
            raise DataError(f"{file}: got {len(rows)} rows, {spec.name} has {num_rows} there")
        splits[split] = _in_senteval_order(rows, limit)
        checksums[spec.file(split)] = sha256_of(file)
    return TransferTask(spec, splits, checksums, limit)


_Row = tuple[int, list[list[str]]]
"""Class number, and the tokens of each sentence."""


def _read(spec: TaskSpec, file: Path) -> list[_Row]:
    rows: list[_Row] = []
    number_of = {label: number for number, label in enumerate(spec.classes)}
    deletion = str.maketrans("", "", spec.removed)
    for table in tables(str(file), "", offline=True):
        require(table, spec.columns, "transfer task")
        for number, cells in table.rows(spec.columns):
            place = f"{file}, line {number}"
            if isinstance(cells, BadRow):
                raise DataError(f"{place}: {cells}; fix the row")
            label, *texts = cells
            if label not in number_of:
                raise DataError(f"{place}: got label {label!r}, wanted {', '.join(spec.classes)}")
            tokens = [text.translate(deletion).split() for text in texts]
            if not all(tokens):
                raise DataError(f"{place}: blank text; remove the row")
            rows.append((number_of[label], tokens))
    return rows


def _in_senteval_order(rows: list[_Row], limit: int | None) -> Split:
    if limit is not None and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    # stable, as in SentEval: rows of equal length and class stay in the order of the file
    ordered = sorted(rows, key=lambda row: ([len(tokens) for tokens in row[1]], row[0]))
    texts = [[" ".join(tokens) for tokens in row] for _, row in ordered]
    return Split(
        [sentences[0] for sentences in texts],
        [sentences[1] for sentences in texts if len(sentences) > 1],
        np.array([label for label, _ in ordered], dtype=np.int64),
    )
