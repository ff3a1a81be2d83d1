"""Files that commands read and write, and whether they may, before the work begins."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lowmem_cft.files import nearest_names, whole_file

STANDARD_INPUT = Path("-")


def read_lines(file: Path, *, keep_blank: bool = False) -> list[str]:
    """The lines of a UTF-8 file, or of standard input (`-`).

    Args:
        keep_blank: lines without a letter are texts too.

    Raises:
        ValueError: there is no such file, it is not UTF-8, or a line is blank and may not be.
    """
    if file == STANDARD_INPUT:
        data, name = sys.stdin.buffer.read(), "standard input"
    elif file.is_file():
        data, name = file.read_bytes(), str(file)
    elif file.is_dir():
        raise ValueError(f"{file} is a folder, wanted a file with a text a line")
    else:
        raise ValueError(f"{file} does not exist; {nearest_names(file)}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 at byte {error.start}; convert it first") from error
    if not text.strip() and not (text and keep_blank):
        raise ValueError(f"{name}: no lines, so nothing to embed")
    # not splitlines: it also cuts at separators that may stand inside a text
    texts = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    for number, line in enumerate(texts, 1):
        if not line.strip() and not keep_blank:
            raise ValueError(
                f"{name}, line {number}: empty; remove it, put a text there, or embed it as it is "
                "with `keep_blank`"
            )
    return texts


def write_vectors(out: Path, texts: list[str], vectors: Any) -> None:
    with whole_file(out) as partial:
        if out.suffix == ".npy":
            import numpy as np

            with partial.open("wb") as stream:
                np.save(stream, vectors)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
            pq.write_table(pa.table({"text": texts, "embedding": column}), partial)


def check_json_name(out: Path | None) -> None:
    if out is not None and out.suffix != ".json":
        raise ValueError(f"--out: got {out.name}, wanted a name that ends in .json")


def check_writable(out: Path | None, option: str = "--out", *, folder: bool = False) -> None:
    """Refuse a bad place of a file, or of a folder, before the work is done, not after."""
    if out is None:
        return
    if out.exists() and out.is_dir() != folder:
        got, wanted = ("file", "folder") if folder else ("folder", "file")
        raise ValueError(f"{option}: {out} is a {got}, wanted a {wanted}; choose another place")
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    import os

    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{option}: cannot write to {parent}; choose another place")
    out.parent.mkdir(parents=True, exist_ok=True)
