"""A file or folder is written whole or not at all; JSON, checksums, names, the cache folder."""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


def cache_folder() -> Path:
    """`$LOWMEM_CFT_CACHE`, else `lowmem-cft` in the user's cache folder."""
    if given := os.environ.get("LOWMEM_CFT_CACHE"):
        return Path(given).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lowmem-cft"


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target`, which is gone when the block ends.

    What a killed process left there goes too.
    """
    # named after this process: another one may be making the same folder
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{glob.escape(target.name)}.*.partial"):
        process = left.name.split(".")[-2]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill; it becomes `target` only when the block ends without an error.

    An existing `target` is replaced at that moment, and stays as it was if anything fails.

    Raises:
        OSError: the disk is full or the place is not writable; nothing half-written remains.
    """
    with scratch_folder(target) as partial:
        yield partial
        old = target.with_name(f"{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def read_json(path: Path, way_out: str, *keys: str) -> dict[str, Any]:
    """A JSON object that has these keys at least.

    Raises:
        ValueError: it cannot be read, or is something else; the message ends in the way out.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {way_out}") from error
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ValueError(f"{path}: got a JSON {kind}, wanted an object; {way_out}")
    if missing := [key for key in keys if key not in values]:
        raise ValueError(f"{path}: has no {', '.join(missing)}; {way_out}")
    return values


def nearest_names(path: Path) -> str:
    """The names in a missing file's folder that are most like its own, in a clause of a message."""
    if not path.parent.is_dir():
        return f"nor does its folder {path.parent}"
    names = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"nearest in {path.parent}: {', '.join(near) or 'nothing of a similar name'}"


_LONGEST = 60
"""Most letters that a list of names takes in a file's name."""


def short_name(names: Sequence[str]) -> str:
    """A part of a file's name that no other list of names gives.

    It is the names themselves where they are short and of plain letters, else it holds a checksum.
    """
    joined = "-".join(names)
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", joined)
    if plain == joined and len(plain) <= _LONGEST:
        return plain
    digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{plain if len(plain) <= _LONGEST else f'{len(names)}-names'}-{digest}"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON whole, so that a reader never sees half of it."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            checksum.update(block)
    return checksum.hexdigest()


def digest(values: Any) -> str:
    """The sha256 of JSON values, in hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside this one to write; it takes its place when the block ends without error.

    A reader never sees half a file, and what was there stays if anything fails.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
