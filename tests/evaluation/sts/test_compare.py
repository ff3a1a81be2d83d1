"""Bootstrap intervals against scipy, and the comparison of two evaluated models."""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import rankdata, spearmanr

from lowmem_cft.cli.tables import comparison_table, score_table
from lowmem_cft.evaluation.sts import bootstrap, compare
from lowmem_cft.evaluation.sts import report as eval_report
from lowmem_cft.evaluation.sts.correlation import Floats, spearman
from lowmem_cft.evaluation.sts.protocols import PROTOCOLS, SCORED, Protocol
from lowmem_cft.evaluation.sts.score import ScoredSet, SetScore

MTEB = PROTOCOLS["mteb"]


def drawn_pairs(name: str, num_pairs: int, num_resamples: int, seed: int = 0) -> list[Floats]:
    """The draws that the module documents: numpy's generator, seeded by seed and name."""
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return [draw.integers(0, num_pairs, num_pairs) for _ in range(num_resamples)]


def scores_of(num_pairs: int, seed: int, noise: float, ties: bool) -> tuple[Floats, Floats]:
    draw = np.random.default_rng(seed)
    gold = draw.uniform(0, 5, num_pairs)
    cosine = gold / 5 + noise * draw.normal(size=num_pairs)
    return (gold.round(), cosine.round(1)) if ties else (gold, cosine)


# --- resampling -------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize("num_pairs", [10, 400])
def test_every_resample_equals_scipy(num_pairs: int, ties: bool) -> None:
    gold, cosine = scores_of(num_pairs, 1, 0.3, ties)
    if ties and num_pairs == 400:
        assert len(set(gold)) == 6
        assert len(set(cosine)) < 40
    got = bootstrap.resampled_spearman("set", gold, [cosine, -cosine], 50)
    wanted = [
        float(spearmanr(cosine[rows], gold[rows]).statistic)
        for rows in drawn_pairs("set", num_pairs, 50)
    ]
    assert got[0] == pytest.approx(wanted, abs=1e-12)
    assert got[1] == pytest.approx([-value for value in wanted], abs=1e-12)
    assert np.ptp(got[0]) > 0.01


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=12))
def test_ranks_of_any_ties_equal_scipys(pairs: list[tuple[int, int]]) -> None:
    gold, cosine = (np.array(side, dtype=np.float64) for side in zip(*pairs, strict=True))
    got = bootstrap.resampled_spearman("s", gold, [cosine], 5)[0]
    for value, rows in zip(got, drawn_pairs("s", len(gold), 5), strict=True):
        x, y = rankdata(cosine[rows]), rankdata(gold[rows])
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            assert value == 0.0
        else:
            assert value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)


def test_a_sets_draws_depend_on_name_and_seed_alone() -> None:
    gold, cosine = scores_of(100, 2, 0.3, ties=False)
    first, again = (bootstrap.resampled_spearman("a", gold, [cosine], 20) for _ in range(2))
    assert np.array_equal(first, again)
    assert np.array_equal(first[0], bootstrap.resampled_spearman("a", gold, [gold, cosine], 20)[1])
    assert not np.array_equal(first, bootstrap.resampled_spearman("b", gold, [cosine], 20))
    assert not np.array_equal(first, bootstrap.resampled_spearman("a", gold, [cosine], 20, seed=1))
    with pytest.raises(ValueError, match="resamples: got 0"):
        bootstrap.resampled_spearman("a", gold, [cosine], 0)


def test_interval_is_the_middle_of_the_values() -> None:
    found = bootstrap.interval(np.arange(1001.0))
    assert (found.low, found.high) == pytest.approx((25, 975))


def test_interval_has_the_width_that_theory_gives() -> None:
    """Of a bivariate normal, Fisher's z of Spearman's r has variance about 1.06 / (n - 3).

    Fieller, Hartley and Pearson, Biometrika 44 (1957).
    """
    draw, num_pairs, rho = np.random.default_rng(0), 2000, 0.6
    x = draw.normal(size=num_pairs)
    y = rho * x + np.sqrt(1 - rho**2) * draw.normal(size=num_pairs)
    found = bootstrap.interval(bootstrap.resampled_spearman("n", x, [y], 1000)[0])
    width = np.arctanh(found.high) - np.arctanh(found.low)
    assert width == pytest.approx(2 * 1.96 * np.sqrt(1.06 / (num_pairs - 3)), rel=0.15)
    assert found.low < spearman(y, x) < found.high


# --- reports ----------------------------------------------------------------------------------


def scored(name: str, gold: Floats, cosine: Floats, sha256: str = "f" * 64) -> ScoredSet:
    score = SetScore(
        name, spearman(cosine, gold), len(gold), len(gold), f"{name}.tsv", 0.5, "sha256:1"
    )
    return ScoredSet(score, cosine, gold, sha256)


def write_report(
    path: Path,
    noise: float,
    names: Sequence[str] = ("STS12", "STS13", "STS14"),
    *,
    protocol: Protocol | None = MTEB,
    cleaned_up: bool = False,
    float32: bool = False,
    sha256: str = "f" * 64,
) -> Path:
    """Sets of 300, 400, ... pairs, of the same gold scores whatever the noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sets = [
        scored(name, *scores_of(300 + 100 * i, i, noise, ties=False), sha256)
        for i, name in enumerate(names)
    ]
    found = eval_report.report(
        f"model {noise}",
        sets,
        protocol=protocol,
        cleaned_up=cleaned_up,
        float32=float32,
        num_resamples=50,
    )
    found.write(path)
    return path


def test_report_reads_back(tmp_path: Path) -> None:
    path = write_report(tmp_path / "eval.json", 0.3)
    values = json.loads(path.read_text())
    assert values["protocol_name"] == "mteb"
    assert values["complete"] is False
    assert values["mean"] == pytest.approx(np.mean([one["spearman"] for one in values["sets"]]))
    for one in (*values["sets"], {"interval": values["mean_interval"]}):
        assert one["interval"]["low"] < one["interval"]["high"]
    widths = [one["interval"]["high"] - one["interval"]["low"] for one in values["sets"]]
    mean = values["mean_interval"]
    assert mean["high"] - mean["low"] < min(widths), "a mean varies less than its sets"
    assert values["mean"] == pytest.approx((mean["low"] + mean["high"]) / 2, abs=0.05)
    found = eval_report.read(path)
    assert found.names == ["STS12", "STS13", "STS14"]
    for i, cosine in enumerate(found.cosines):
        assert np.array_equal(cosine, scores_of(300 + 100 * i, i, 0.3, ties=False)[1])


def test_difference_and_interval_by_hand(tmp_path: Path) -> None:
    a, b = (write_report(tmp_path / f"{n}.json", n) for n in (0.5, 0.4))
    found = compare.compare(a, b, 200)
    diffs = []
    for i, entry in enumerate(found.sets):
        gold = scores_of(300 + 100 * i, i, 0.5, ties=False)[0]
        first, second = (scores_of(len(gold), i, n, ties=False)[1] for n in (0.5, 0.4))
        one = [
            float(spearmanr(second[r], gold[r]).statistic - spearmanr(first[r], gold[r]).statistic)
            for r in drawn_pairs(entry.name, len(gold), 200)
        ]
        diffs.append(one)
        assert entry.difference == pytest.approx(spearman(second, gold) - spearman(first, gold))
        low, high = np.percentile(one, [2.5, 97.5])
        assert (entry.interval.low, entry.interval.high) == pytest.approx((low, high))
        assert entry.difference > 0
    low, high = np.percentile(np.mean(diffs, axis=0), [2.5, 97.5])
    assert (found.mean.interval.low, found.mean.interval.high) == pytest.approx((low, high))
    assert found.mean.difference == pytest.approx(found.mean.b - found.mean.a)
    assert found.mean.interval.low > 0
    back = compare.compare(b, a, 200)
    assert back.mean.difference == pytest.approx(-found.mean.difference)
    assert back.mean.interval.low == pytest.approx(-found.mean.interval.high)


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    path = write_report(tmp_path / "eval.json", 0.4)
    found = compare.compare(path, path, 50)
    for entry in (*found.sets, found.mean):
        assert (entry.difference, entry.interval.low, entry.interval.high) == (0, 0, 0)


def test_order_of_sets_does_not_count(tmp_path: Path) -> None:
    path = write_report(tmp_path / "a.json", 0.4)
    values = json.loads(path.read_text())
    values["sets"].reverse()
    (tmp_path / "b.json").write_text(json.dumps(values))
    arrays = dict(np.load(tmp_path / "a.npz"))
    turned = {
        f"{kind}_{2 - i}": arrays[f"{kind}_{i}"] for kind in ("cosine", "gold") for i in range(3)
    }
    np.savez(tmp_path / "b.npz", **turned)
    assert compare.compare(path, tmp_path / "b.json", 50).mean.difference == 0


REFUSED = {
    "protocol": ({"protocol": PROTOCOLS["senteval"]}, "different protocols"),
    "clean-up": ({"cleaned_up": True}, "different protocols"),
    "sets": ({"names": ("STS12", "STS13")}, "different sets: STS14"),
    "pairs": ({"sha256": "e" * 64}, "STS12: different pairs: sha256 ffffffffffff"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, what: str) -> None:
    options, message = REFUSED[what]
    a = write_report(tmp_path / "a.json", 0.4)
    b = write_report(tmp_path / "b.json", 0.4, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        compare.compare(a, b)


def test_no_protocol_is_not_mtebs(tmp_path: Path) -> None:
    a, b = (write_report(tmp_path / f"{n}.json", n, protocol=None) for n in (0.4, 0.3))
    assert compare.compare(a, b, 9).a.label == SCORED != MTEB.scored
    with pytest.raises(ValueError, match="different protocols"):
        compare.compare(write_report(tmp_path / "c.json", 0.4), b, 9)


def test_damaged_reports(tmp_path: Path) -> None:
    path = write_report(tmp_path / "a.json", 0.4)
    other = write_report(tmp_path / "b.json", 0.4)
    (tmp_path / "b.npz").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"b\.npz: the similarities .* score the model again"):
        compare.compare(path, other)
    (tmp_path / "b.npz").unlink()
    with pytest.raises(ValueError, match=r"b\.npz: the similarities"):
        compare.compare(path, other)
    write_report(tmp_path / "c.json", 0.4, ("STS13", "STS12", "STS14", "STS15"))
    (tmp_path / "c.npz").replace(tmp_path / "b.npz")
    values = json.loads(other.read_text())
    values["sets"] = values["sets"][1:]
    other.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"holds \[300, 400\] pairs, b\.json says \[400, 500\]"):
        compare.compare(path, other)
    for text in ("{}", "no json", "[1]", '{"sets": [{}]}'):
        other.write_text(text)
        with pytest.raises(ValueError, match=r"b\.json: no report of `lowmem-cft eval`"):
            compare.compare(path, other)


def test_reports_of_run_folders(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
    with pytest.raises(ValueError, match="no such run folder or report"):
        compare.find_reports(tmp_path / "gone", b)
    with pytest.raises(ValueError, match="holds no report"):
        compare.find_reports(a, b)
    (a / "eval.json").touch()
    (b / "eval-mteb.json").touch()
    assert compare.find_reports(a, b) == (a / "eval.json", b / "eval-mteb.json")
    (a / "eval-mteb.json").touch()
    assert compare.find_reports(a, b) == (a / "eval-mteb.json", b / "eval-mteb.json")
    assert compare.find_reports(b / "eval-mteb.json", a)[1] == a / "eval-mteb.json"
    (b / "eval.json").touch()
    with pytest.raises(ValueError, match=r"several reports could be meant .* name the two files"):
        compare.find_reports(a, b)
    (b / "eval.json").unlink()
    (b / "eval-mteb.json").rename(b / "eval-senteval.json")
    with pytest.raises(ValueError, match="no report of the same name"):
        compare.find_reports(a, b)
    transfer = tmp_path / "eval-transfer.json"
    transfer.write_text('{"suite": "transfer"}')
    for places in ((a, transfer), (transfer, a)):
        with pytest.raises(ValueError, match=r"eval-transfer\.json: a report of transfer tasks"):
            compare.find_reports(*places)
    valid = write_report(tmp_path / "mine.json", 0.4)
    with pytest.raises(ValueError, match=r"no report of the same name .* name the two files"):
        compare.find_reports(a, valid)


def test_names_of_reports_in_a_run() -> None:
    """A report never replaces one of other sets, or of the same sets scored otherwise."""
    gold, cosine = scores_of(50, 0, 0.3, ties=False)
    of = lambda *names: [scored(name, gold, cosine) for name in names]
    every = of(*(entry.name for entry in MTEB.sets))

    def name(sets: list[ScoredSet], protocol: Protocol | None, **options: bool) -> str:
        found = eval_report.report("m", sets, protocol=protocol, num_resamples=2, **options)
        return found.file_name

    assert name(every, MTEB) == "eval-mteb.json"
    assert name(of("STS13", "STS12"), MTEB) == "eval-mteb-partial-STS12-STS13.json"
    assert name(every, MTEB, cleaned_up=True) == "eval-mteb-clean-up.json"
    assert name(every, MTEB, float32=True) == "eval-mteb-float32.json"
    assert name(of("STS12"), None) == "eval-sts-STS12.json"
    assert name(of("demo"), None, cleaned_up=True) == "eval-sts-demo-clean-up.json"
    names = [name(every[:k], None) for k in range(1, 10)]
    assert len(set(names)) == 9
    assert max(map(len, names)) < 90
    file = lambda path, sha256: name([scored(path, gold, cosine, sha256)], None)
    assert file("a/pairs.tsv", "e" * 64) == "eval-sts-pairs-eeeeeeeeeeee.json"
    assert file("b/pairs.tsv", "f" * 64) == "eval-sts-pairs-ffffffffffff.json"
    odd = [file(path, "f" * 64) for path in ("a b.tsv", "a:b.tsv", "x" * 300 + ".tsv")]
    assert len(set(odd)) == 3
    for one in odd:
        assert re.fullmatch(r"eval-sts-[A-Za-z0-9._-]{1,80}\.json", one)


def test_reports_of_other_sets_are_found_by_name(tmp_path: Path) -> None:
    paths = []
    for run, noise in (("a", 0.4), ("b", 0.3)):
        for names in (["STS12"], ["transfer.tsv"]):
            path = write_report(tmp_path / run / "new.json", noise, names, protocol=None)
            kind = eval_report.report(
                "m", [scored(names[0], *scores_of(300, 0, noise, ties=False))], num_resamples=2
            ).file_name
            paths.append(path.rename(path.with_name(kind)))
            path.with_suffix(".npz").rename(paths[-1].with_suffix(".npz"))
        if run == "b":
            paths.pop(2).unlink()
    assert compare.find_reports(tmp_path / "a", tmp_path / "b") == (paths[1], paths[2])
    assert compare.compare(tmp_path / "a", tmp_path / "b", 10).a.names == ["transfer.tsv"]


def test_the_pairs_of_another_model_are_noticed(tmp_path: Path) -> None:
    a, b = (write_report(tmp_path / f"{n}.json", n) for n in (0.4, 0.3))
    (tmp_path / "0.4.npz").replace(tmp_path / "0.3.npz")
    with pytest.raises(ValueError, match=r"0\.3\.npz: its pairs of STS12 do not have the score in"):
        eval_report.read(b)
    assert eval_report.read(write_report(a, 0.4)).names == ["STS12", "STS13", "STS14"]
    arrays = dict(np.load(tmp_path / "0.4.npz"))
    np.savez(tmp_path / "0.4.npz", **{**arrays, "cosine_1": np.full(400, np.nan)})
    with pytest.raises(ValueError, match=r"0\.4\.npz: STS13: got 400 of 400 cosines"):
        eval_report.read(a)
    np.savez(tmp_path / "0.4.npz", **{**arrays, "gold_1": arrays["gold_1"][:-1]})
    with pytest.raises(ValueError, match=r"holds \[300, 399, 500\] pairs"):
        eval_report.read(a)


def test_scores_and_intervals_are_readable_in_80_columns() -> None:
    """Whole names of the protocol's sets, and bounds below 0 that are told apart."""
    gold, cosine = scores_of(50, 0, 0.3, ties=False)
    every = [scored(entry.name, gold, cosine) for entry in MTEB.sets]
    every = [replace(one, score=replace(one.score, own_text=False)) for one in every]
    found = eval_report.report("m", every, protocol=MTEB, num_resamples=9)
    low = bootstrap.Interval(-0.272, -0.0134)
    console = Console(file=io.StringIO(), width=80)
    console.print(score_table(replace(found, intervals=[low] * 9)))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for entry in MTEB.sets:
        assert re.search(rf"│ {entry.name}\* .*│-27\.20 to -1\.34 │", shown), shown


def test_a_comparison_says_what_its_mean_and_precision_are(tmp_path: Path) -> None:
    def shown(*paths: Path) -> str:
        console = Console(file=io.StringIO(), width=200)
        console.print(comparison_table(compare.compare(*paths, 10)))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    a, b = (write_report(tmp_path / f"{n}.json", n) for n in (0.4, 0.3))
    plain = shown(a, b)
    assert "│ mean of 3 " in plain
    assert "float32" not in plain
    whole = write_report(tmp_path / "w.json", 0.4, [entry.name for entry in MTEB.sets])
    assert "│ mean  " in shown(whole, whole)
    exact = write_report(tmp_path / "exact.json", 0.3, float32=True)
    assert "B was computed in float32, A in its model's own dtype" in shown(a, exact)
    assert "A was computed in float32, B in its model's own dtype" in shown(exact, a)
    assert compare.compare(a, exact, 10).to_json()["b"]["float32"] is True
    assert "float32" not in shown(exact, exact)
