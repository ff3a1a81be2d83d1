"""Files that commands read and write, and whether they may, before the work begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowmem_cft.files import whole_file


def read_lines(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"no such file: {file}")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}; convert it first") from error
    # not splitlines: it also cuts at separators that may stand inside a text
    texts = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not text.strip():
        raise ValueError(f"{file}: no lines, so nothing to embed")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise ValueError(f"{file}, line {number}: empty; remove it or put a text there")
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
