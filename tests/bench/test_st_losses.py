"""The benchmark of the losses for sentence-transformers on a tiny model: its last line."""

from __future__ import annotations

import json

import pytest

from bench import st_losses

pytest.importorskip("sentence_transformers", minversion="6.0")
SIDES = ["ours", "st", "ours_cached", "st_cached"]


@pytest.mark.parametrize("softmaxes", ["one_way", "symmetric", "gte"])
def test_last_line(capfd: pytest.CaptureFixture[str], softmaxes: str) -> None:
    assert st_losses.main(["--quick", "--device", "cpu", "--softmaxes", softmaxes]) == 0
    out, err = capfd.readouterr()
    (line,) = out.splitlines()
    results = json.loads(line)
    rows = {row["side"]: row for row in results["rows"]}
    assert list(rows) == SIDES
    assert all(len(row["ms_rounds"]) == 2 and row["ms"] > 0 for row in rows.values())
    assert 0 < results["difference"] < 1e-3
    for ratio, kind in (("", ""), ("_cached", "_cached")):
        ours, theirs = rows[f"ours{kind}"], rows[f"st{kind}"]
        speedup = theirs["ms"] / ours["ms"]
        assert results[f"speedup{ratio}"] == pytest.approx(speedup, rel=2e-3)
        memory = ours["peak_bytes"] / theirs["peak_bytes"]
        assert results[f"memory_ratio{ratio}"] == pytest.approx(memory, rel=2e-3)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert rows["ours_cached"]["peak_bytes"] < rows["ours"]["peak_bytes"]
    assert err.index("round 1: ours:") < err.index("round 1: st:")
    assert err.index("round 2: st:") < err.index("round 2: ours:")


def test_other_work_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(st_losses.DIRECTIONS, "gte", ("query_to_doc",))
    assert st_losses.main(["--quick", "--device", "cpu", "--softmaxes", "gte"]) == 1
    assert "NOT THE SAME WORK" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [("width", "16", "a multiple of 32"), ("tokens", "3", "at least 4")],
)
def test_wrong_sizes(
    capsys: pytest.CaptureFixture[str], name: str, value: str, wanted: str
) -> None:
    with pytest.raises(SystemExit):
        st_losses.main([f"--{name}", value])
    assert f"--{name}: got {value}, wanted {wanted}" in capsys.readouterr().err
