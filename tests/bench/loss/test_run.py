"""The benchmark of the loss at tiny sizes: its rows, its judgement and its picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.loss import __main__ as command
from bench.loss import run
from bench.loss.cases import BOUNDS, exact_gradients, make_task
from bench.loss.cases import relative_error as case_error
from bench.loss.sides import Side, make_sides

CPU = torch.device("cpu")
SIZE = (24, 48, 32)
FIGURES = ("ms_median", "ms_p20", "ms_p80", "extra_bytes", "useful_tflops", "share_of_peak")


def make_side(**variants: Callable[[Any], Any]) -> Any:
    """An implementation whose variants are functions of the task."""

    class Other(Side):
        name = "other"

        def variants(self, task: Any) -> Any:
            return {name: lambda f=f: lambda: f(task) for name, f in variants.items()}

    return Other()


def plain(query_MD: Tensor, doc_ND: Tensor, task: Any, *, temperature: float = 1.0) -> Any:
    """The gradients as they should be; `temperature` is a factor."""
    leaves = [x.detach().float().requires_grad_() for x in (query_MD, doc_ND)]
    unit_MD, unit_ND = (F.normalize(leaf, dim=1) for leaf in leaves)
    logit_MN = unit_MD @ unit_ND.T / (task.temperature * temperature)
    target_M = torch.arange(len(query_MD))
    value = F.cross_entropy(logit_MN, target_M)
    if task.symmetric:
        value = (value + F.cross_entropy(logit_MN[:, : len(query_MD)].T, target_M)) / 2
    return [[gradient] for gradient in torch.autograd.grad(value, leaves)]


def right(task: Any) -> Any:
    return plain(task.query_MD, task.doc_ND, task)


def colder(task: Any) -> Any:
    return plain(task.query_MD, task.doc_ND, task, temperature=0.9)


def no_hard_negatives(task: Any) -> Any:
    m, n, d = task.size
    (d_query_MD,), (d_doc_MD,) = plain(task.query_MD, task.doc_ND[:m], task)
    return [d_query_MD], [d_doc_MD, torch.zeros(n - m, d)]


def other_direction(task: Any) -> Any:
    changed = type(task)(task.query_MD, task.doc_ND, "one_way", task.temperature, True)
    if not task.symmetric:
        changed = type(task)(task.query_MD, task.doc_ND, "symmetric", task.temperature, True)
    return plain(task.query_MD, task.doc_ND, changed)


def not_normalized(task: Any) -> Any:
    (d_query_MD,), rest = right(task)
    return [d_query_MD + 0.2 * d_query_MD.abs().max() * task.query_MD.float()], rest


def not_a_number(task: Any) -> Any:
    (d_query_MD,), rest = right(task)
    d_query_MD[3, 4] = torch.nan
    return [d_query_MD], rest


def a_row_short(task: Any) -> Any:
    (d_query_MD,), rest = right(task)
    return [d_query_MD[:-1]], rest


def fails(task: Any) -> Any:
    raise RuntimeError("it does not\nwork")


def test_rows_line_and_picture(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from matplotlib.image import imread

    out, picture = tmp_path / "found.json", tmp_path / "found.png"
    here, rivals = (
        ["ours", "ours_reference", "eager", "st", "st-best"],
        ["ours_triton", "memeff", "inf_cl", "cce", "liger"],
    )
    (here if hasattr(F, "linear_cross_entropy") else rivals).append("torch_linear")
    arguments = [
        "--sizes",
        "24x48x32",
        "--rounds",
        "3",
        "--paths",
        "reference",
        "triton",
        "--device",
        "cpu",
    ]
    arguments += ["--mini-batches", "5", "24", "--sides", *here, *rivals]
    code = command.main([*arguments, "--out", str(out), "--plot", str(picture)])
    shown = capfd.readouterr()
    results = json.loads(shown.out.splitlines()[-1])
    assert code == 0, shown.err
    assert results == json.loads(out.read_text(encoding="utf-8"))
    rows = {(row["impl"], row["mode"]): row for row in results["rows"]}
    assert rows.keys() == {(n, mode) for n in here + rivals for mode in ("one_way", "symmetric")}
    for (name, _), row in rows.items():
        assert (row["m"], row["n"], row["d"], row["dtype"]) == (*SIZE, "float32")
        if name in rivals:
            assert row["status"] == "absent"
            reasons = ("not installed", "not run: needs CUDA", "not in torch 2.1")
            assert row["note"].startswith(reasons)
            assert row["ms_median"] is None
            continue
        assert row["status"] == "ok", row
        assert all(row[key] > 0 for key in FIGURES), row
        assert row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
        assert 0 < row["max_rel_error"] < 1e-4
    assert rows["eager", "one_way"]["extra_bytes"] >= 2 * 4 * SIZE[0] * SIZE[1]
    assert rows["ours", "one_way"]["by_ours"] == 1
    assert results["speedup_vs_st"] == rows["st", "one_way"]["by_ours"]
    assert results["speedup_vs_st_best"] == rows["st-best", "one_way"]["by_ours"]
    assert results["speedup_vs_eager"] == rows["eager", "one_way"]["by_ours"]
    assert set(results["headline"].values()) == {"24x48x32 float32 one_way"}
    assert results["peak_tflops"]["float32"] > 0
    pixels = imread(picture)
    assert min(pixels.shape[:2]) > 100
    assert len({tuple(color) for color in pixels.reshape(-1, pixels.shape[2])[::7].tolist()}) > 4


@pytest.mark.parametrize(
    "wrong",
    [
        colder,
        no_hard_negatives,
        other_direction,
        not_normalized,
        not_a_number,
        a_row_short,
    ],
)
def test_wrong_is_caught(wrong: Callable[[Any], Any]) -> None:
    sides = [make_side(it=right), make_side(it=wrong)]
    dtypes = [torch.float32, torch.bfloat16]
    results = run.run(CPU, [SIZE], dtypes, sides=sides, rounds=3)
    assert len(results["rows"]) == 8
    for good, bad in zip(results["rows"][::2], results["rows"][1::2], strict=True):
        assert good["status"] == "ok", good
        assert bad["status"] == "wrong", bad
        assert bad["note"].startswith("it: off by")
        assert all(bad[key] is None for key in (*FIGURES, "by_ours"))
    json.dumps(results, allow_nan=False)


def test_a_correct_variant_stands_for_the_others() -> None:
    sides = [make_side(bad=colder, none=fails, good=right), make_side(none=fails)]
    one, other = run.run(CPU, [SIZE], modes=["one_way"], sides=sides, rounds=3)["rows"]
    assert one["status"] == "ok"
    assert one["note"].startswith("good (bad: off by")
    assert "none: RuntimeError: it does not" in one["note"]
    assert other["status"] == "failed"
    assert other["note"] == "none: RuntimeError: it does not"


def test_torch_without_the_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    sides = [side for side in make_sides() if side.name == "torch_linear"]
    (row,) = run.run(CPU, [SIZE], modes=["one_way"], sides=sides)["rows"]
    assert row["status"] == "absent"
    assert row["note"] == f"not in torch {torch.__version__}, from 2.13 on"


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
def test_variants_of_torchs_own_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both do the same work; one that does not is wrong and stands for nothing."""
    sides = [side for side in make_sides() if side.name == "torch_linear"]
    task = make_task(SIZE, "symmetric", torch.bfloat16, CPU, 0.05, True)
    wanted = exact_gradients(task)
    for name, prepare in sides[0].variants(task).items():
        error = max(case_error(*pair) for pair in zip(prepare()(), wanted, strict=True))
        assert error < BOUNDS[torch.bfloat16], name
    right = F.linear_cross_entropy
    monkeypatch.setattr(F, "linear_cross_entropy", lambda *a, **k: right(*a, **k) * 1.1)
    for row in run.run(CPU, [SIZE], sides=sides)["rows"]:
        assert row["status"] == "wrong"


@pytest.mark.parametrize("when", ["judged", "measured"])
def test_who_breaks_the_device_is_named(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Rows of the sizes before stay; others are not blamed."""
    calls: list[Any] = []

    def breaks(task: Any) -> Any:
        calls.append(task)
        if task.size != SIZE and (when == "judged" or len(calls) > 12):
            monkeypatch.setattr(run, "synchronize", fails)
            raise RuntimeError("an illegal memory access was encountered")
        return right(task)

    breaking = make_side(it=breaks)
    breaking.name = "breaking"
    ours = make_side(it=right)
    ours.name = "ours"
    sizes = [SIZE, (8, 16, 32), (8, 8, 8)]
    results = run.run(CPU, sizes, modes=["one_way"], sides=[ours, breaking], rounds=3)
    assert results["stopped"].startswith("breaking broke the device: RuntimeError: an illegal")
    rows = [(row["m"], row["impl"], row["status"]) for row in results["rows"]]
    assert rows == [
        (24, "ours", "ok"),
        (24, "breaking", "ok"),
        (8, "ours", "skipped"),
        (8, "breaking", "failed"),
    ]
    json.dumps(results, allow_nan=False)


def test_what_needs_too_much_is_left_out() -> None:
    results = run.run(CPU, [SIZE], sides=make_sides()[:1], limit_bytes=1000)
    assert [row["status"] for row in results["rows"]] == ["skipped"] * 2
    assert results["speedup_vs_st"] is None


def test_ours_failing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = make_side(chunked=fails)
    broken.name = "ours"
    monkeypatch.setattr(command, "make_sides", lambda *args: [broken])
    assert command.main(["--sizes", "24x48x32", "--device", "cpu"]) == 1


def test_headline() -> None:
    def row(m: int, by_ours: float | None, **other: str) -> dict[str, Any]:
        size = {"m": m, "n": 2 * m, "d": 16, "dtype": "float32", "mode": "one_way"}
        return {"impl": "st", "by_ours": by_ours, **size, **other}

    rows = [row(8, 2.0), row(64, 3.0), row(99, 9.0, mode="symmetric"), row(200, None)]
    assert run.speedup(rows, "st", (8, 16, 16), "float32") == (2.0, "8x16x16 float32 one_way")
    assert run.speedup(rows, "st", (8, 16, 16), "bfloat16") == (3.0, "64x128x16 float32 one_way")
    assert run.speedup(rows, "eager", (8, 16, 16), "float32") == (None, "none")
