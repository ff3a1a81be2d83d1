"""The comparing of outputs finds what differs, and passes over what may differ."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from places import ROOT

SCRIPT = ROOT / "tests" / "support" / "outputs.py"

CARD = """\
12 s on CPU, 1 threads, 33.1 rows per second,
peak memory 0.61 GiB. python 3.11.7, torch 2.13.0.
"""
SAID = """\
<checkout>/lowmem_cft/data/triplets.jsonl: 450 rows, 0 skipped
plan: chunks of 512 tokens; about 0.64 of 6.00 GiB, 1.10 times the cost of the plain step
step 3/6  loss 2.5081  accuracy 12%  rank 9.1  101.3 rows/s
"""
REPORT = """\
| dates | 2026-01-02 03:04 to 2026-01-02 03:05 UTC |
| train | 6 of 4,594 (0.13 %) | 16 | 0.005 | 96 | 3.3766 | 2 | 49.36 | 0.68 |
| base | every set | 31 | 0.0788 | 2026-01-02 03:04 | `f50dd2` |
In all 97 seconds.
"""
FILES: dict[str, Any] = {
    "tiny/log.jsonl": [
        {"step": 1, "loss": 2.25, "step_ms": 7.5, "peak_bytes": 100},
        {"step": 2, "loss": 2.0, "step_ms": 8.5, "peak_bytes": 110},
    ],
    "tiny/metrics.json": {
        "after": [{"name": "demo", "spearman": 0.7026795934676124}],
        "train_seconds": 12.5,
        "versions": {"torch": "2.13.0"},
    },
    "plans/demo.json": {"peak_bytes": {"total": 1000}, "notes": []},
    "tiny/README.md": CARD,
    "tiny/train.txt": SAID,
    "tiny/report.md": REPORT,
}


def _write(folder: Path, name: str, values: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(values, str):
        text = values
    elif isinstance(values, list):
        text = "".join(json.dumps(value) + "\n" for value in values)
    else:
        text = json.dumps(values)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of the same outputs."""
    for name, values in FILES.items():
        _write(tmp_path / "a", name, values)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def _compare(folders: tuple[Path, Path], *more: str) -> tuple[int, list[str]]:
    command = [sys.executable, str(SCRIPT), "compare", *map(str, folders), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


def _change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_the_same_is_the_same(folders: tuple[Path, Path]) -> None:
    assert _compare(folders) == (0, [f"files compared: {len(FILES)}", "no difference"])


def test_every_change_is_found(folders: tuple[Path, Path]) -> None:
    _, b = folders
    _change(b / "tiny/metrics.json", "0.7026795934676124", "0.7026795934676126")
    _change(b / "tiny/log.jsonl", "2.25", "2.5")
    _change(b / "plans/demo.json", "1000", "1001")  # predicted memory is a result
    _change(b / "tiny/train.txt", "loss 2.5081", "loss 2.5082")
    _change(b / "tiny/report.md", "`f50dd2`", "`f50dd3`")
    code, said = _compare(folders)
    assert code == 1
    assert said[1:] == [
        "plans/demo.json: /peak_bytes/total: 1000 -> 1001",
        "tiny/log.jsonl: line 1/loss: 2.25 -> 2.5",
        "tiny/metrics.json: /after/0/spearman: 0.7026795934676124 -> 0.7026795934676126",
        "tiny/report.md: -| base | every set | ... | 0.0788 | ... | `f50dd2` |",
        "tiny/report.md: +| base | every set | ... | 0.0788 | ... | `f50dd3` |",
        "tiny/train.txt: -step 3/6  loss 2.5081  accuracy 12%  rank 9.1  ... rows/s",
        "tiny/train.txt: +step 3/6  loss 2.5082  accuracy 12%  rank 9.1  ... rows/s",
    ]
    assert _compare(folders, "--only", "plans")[1] == [
        "files compared: 1",
        "plans/demo.json: /peak_bytes/total: 1000 -> 1001",
    ]


def test_time_memory_paths_and_versions_are_passed_over(folders: tuple[Path, Path]) -> None:
    _, b = folders
    for file, old, new in (
        ("tiny/metrics.json", "12.5", "99.5"),
        ("tiny/metrics.json", "2.13.0", "2.14.1"),
        ("tiny/log.jsonl", "7.5", "70.5"),
        ("tiny/log.jsonl", "100", "120"),
        ("tiny/README.md", "12 s on", "9 s on"),
        ("tiny/README.md", "33.1 rows", "40 rows"),
        ("tiny/README.md", "0.61 GiB. python 3.11.7", "1.5 GiB. python 3.12.1"),
        ("tiny/train.txt", "lowmem_cft/data/triplets", "lowmem_cft/rows/shipped/triplets"),
        ("tiny/train.txt", "6.00 GiB", "5.12 GiB"),
        ("tiny/train.txt", "101.3 rows/s", "9.9 rows/s"),
        ("tiny/report.md", "03:05 UTC", "03:06 UTC"),
        ("tiny/report.md", "| 2 | 49.36 | 0.68 |", "| 3 | 59 | 0.70 |"),
        ("tiny/report.md", "| 31 |", "| 1,031 |"),
        ("tiny/report.md", "97 seconds", "1.6 minutes"),
    ):
        _change(b / file, old, new)
    with (b / "tiny/train.txt").open("a", encoding="utf-8") as file:
        file.write("converting small.gguf to safetensors (once)\n\n")
        file.write("Converting:  34%|###  | 93/272 [00:01<00:01, 93.25it/s]\n")
        file.write("Converting:   0%|     | 0/272 [00:00<?, ?it/s]\n")
        file.write("1353 distinct texts, tokenised once\n")
    assert _compare(folders)[0] == 0


def test_a_field_or_file_that_went_is_found(folders: tuple[Path, Path]) -> None:
    a, b = folders
    (b / "tiny/README.md").unlink()
    _write(b, "plans/demo.json", {"notes": [], "peak_bytes": {"total": 1000}})
    _write(b, "tiny/metrics.json", {"after": [], "more": None})
    code, said = _compare(folders)
    assert code == 1
    assert said[1:] == [
        f"tiny/README.md: only in {a}",
        "plans/demo.json: the same values in another order",
        'tiny/metrics.json: /after/0/name: "demo" -> nothing',
        "tiny/metrics.json: /after/0/spearman: 0.7026795934676124 -> nothing",
        "tiny/metrics.json: /after: nothing -> []",
        "tiny/metrics.json: /more: nothing -> null",
    ]


def test_nothing_in_common_is_a_difference(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert _compare((tmp_path / "a", tmp_path / "b"))[0] == 1


def test_this_checkout_can_be_run(tmp_path: Path) -> None:
    """Through the console script that pyproject.toml names, with its own modules."""
    command = [sys.executable, str(SCRIPT), "make", str(tmp_path / "out"), "--only", "recipes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "out" / "recipes" / "names.txt").read_text(encoding="utf-8")
    assert said.startswith("$ lowmem-cft recipes\nexit code 0\n--- standard output\n")
    assert "\ndemo  " in said


def test_a_librarys_progress_bar_is_left_out(tmp_path: Path) -> None:
    from outputs import compare

    for name, shown in (("a", "50%|##  | 1/2 [00:02<00:02, 1.2it/s]\n"), ("b", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "said.txt").write_text(f"loading\n{shown}loaded\n")
    assert compare(tmp_path / "a", tmp_path / "b") == []
    (tmp_path / "b" / "said.txt").write_text("loading\n")
    assert compare(tmp_path / "a", tmp_path / "b") == ["said.txt: -loaded"]
