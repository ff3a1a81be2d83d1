"""Where things that can be made again are kept, and how a folder is written whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


def cache_folder() -> Path:
    """`$LOWMEM_CFT_CACHE`, else `lowmem-cft` in the user's cache folder."""
    if given := os.environ.get("LOWMEM_CFT_CACHE"):
        return Path(given).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lowmem-cft"


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill; it becomes `target` only when the block ends without an error.

    An existing `target` is replaced at that moment, and stays as it was if anything fails.

    Raises:
        OSError: the disk is full or the place is not writable; nothing half-written remains.
    """
    # one of our own: another process may be making the same folder
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{glob.escape(target.name)}.*.partial"):
        process = left.name.split(".")[-2]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    try:
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
    finally:
        shutil.rmtree(partial, ignore_errors=True)
