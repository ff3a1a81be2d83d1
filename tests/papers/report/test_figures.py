"""Ours beside the published figures, set by set and task by task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fabricated import (
    MTEB,
    RESAMPLES,
    SENTEVAL,
    Fabricated,
    read_text,
    row_of,
)
from lowmem_cft.evaluation.sts import compare
from lowmem_cft.papers.request import PAPERS


def test_the_table_has_the_records_figures(phi: Fabricated) -> None:
    text, folder = read_text(phi), phi.folder
    base, trained = (
        json.loads((folder / "evals" / f"{name}.json").read_text()) for name in ("base", "evaluate")
    )
    paired = compare.compare(folder / "evals/base.json", folder / "evals/evaluate.json", RESAMPLES)
    published = PAPERS["cft"].published("phi-2", "fine-tuned")
    assert published is not None
    for i, after in enumerate(trained["sets"]):
        cells = row_of(text, after["name"])
        before, difference = base["sets"][i], paired.sets[i]
        assert cells[1] == "60"
        for place, side in ((2, before), (4, after)):
            low, high = (100 * side["interval"][end] for end in ("low", "high"))
            assert cells[place] == f"{100 * side['spearman']:.2f} ({low:.2f} to {high:.2f})"
        assert cells[5] == f"{published.sets[after['name']].value:.2f} ‡"
        low, high = (100 * end for end in (difference.interval.low, difference.interval.high))
        assert cells[6] == f"{100 * difference.difference:+.2f} ({low:+.2f} to {high:+.2f})"
        assert difference.difference > 0.05
    mean = row_of(text, "**mean**")
    assert mean[2].startswith(f"{100 * base['mean']:.2f} (")
    assert (mean[3], mean[5]) == ("32.21 ‡", "70.89 ‡")
    assert mean[6].startswith(f"{100 * paired.mean.difference:+.2f} (")


def test_a_known_bug_is_said(phi: Fabricated) -> None:
    text = read_text(phi)
    assert "‡ trained: a known bug. Phi-2's tokenizer ignores" in text
    assert "Expect more than 70.89" in text
    assert "†" not in text


def test_second_hand_figures_and_cut_sets_are_marked(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "cft", "gemma-2b")
    made.evaluate("base", 0.8, set_pairs=100)
    text, values = made.report()
    assert row_of(text, "STS12")[2].endswith(" §")
    assert row_of(text, "STS12")[3] == "43.83 †"
    assert row_of(text, "STS17")[3] == "-"
    assert row_of(text, "STS12")[4:] == ["not run", "75.80 †", "-"]
    assert row_of(text, "**mean**")[5] == "81.56 †"
    assert "† Not verified: copied at second hand" in text
    assert "§ Not the protocol's whole set" in text
    assert "a third party measured 75.71" in text
    assert "of low confidence" in text
    first = values["sts"]["rows"][0]
    assert first["published"]["base"]["verified"] is False
    assert first["ours"]["base"]["whole"] is False


def test_a_mean_over_fewer_sets_has_its_own_published_one(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "cft", "minicpm-2b")
    made.evaluate("base", 0.8, names=("STS12", "STS13"))
    made.evaluate("evaluate", 0.2, names=("STS12", "STS14"))
    text, _ = made.report()
    mean = row_of(text, "**mean**")
    assert mean[3] == f"{(7.27 + 18.38) / 2:.2f}"
    assert mean[5] == f"{(76.38 + 81.55) / 2:.2f}"
    assert "computed here over the 2 sets" in text
    assert "our mean is over 2 sets instead of the protocol's" in text
    assert "trained - base: no paired difference (different sets" in text
    assert mean[6] == "-"


def test_another_protocol_is_called_out(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "prompteol", "opt-1.3b")
    made.evaluate("base", 0.8, MTEB)
    text, _ = made.report()
    assert "scored by another protocol" in text
    assert "than the published figures (senteval): the two are not comparable" in text


def test_prompteol(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "prompteol", "opt-1.3b")
    made.evaluate("base", 0.8, SENTEVAL)
    made.search()
    made.evaluate("evaluate-icl", 0.5, SENTEVAL)
    made.transfer("transfer-base", 0.8)
    text, values = made.report()
    cells = row_of(text, "STSBenchmark-test")
    assert [cells[i] for i in (3, 5, 7)] == ["73.21 †", "78.80", "87.71"]
    assert cells[8].startswith("+")
    assert cells[9] == "-"
    mean = row_of(text, "**mean**")
    assert [mean[i] for i in (3, 5, 7)] == ["73.18 †", "77.52", "84.79"]
    assert "Ablations" not in text
    assert "scale OPT's attention twice" in text
    # demonstrations: ten, and none wherever it stands
    assert "relating to switzerland or its people." in text
    assert "improves its mean by 4.34 points" in text
    assert "15 demonstrations were tried on 200 pairs" in text
    assert "15 score higher than no demonstration" in text
    assert row_of(text, "Sentence 9 \\| a -> Word")[1] == "10"
    assert "Sentence 10 " not in text
    assert row_of(text, "none") == ["none", "16", "50.00 (40.00 to 60.00)", "-"]
    assert len(values["search"]["trials"]) == 16
    # transfer: cut rows are marked, the interval is Wilson's
    cells = row_of(text, "MR")
    assert cells[1:] == ["500", "80.00 (76.27 to 83.27) §", "88.06 †", "not run", "-"]
    assert row_of(text, "TREC")[2:4] == ["80.00 (76.27 to 83.27)", "95.00 †"]
    assert row_of(text, "MRPC")[2:4] == ["not run", "73.97 †"]


@pytest.mark.parametrize(
    ("paper", "others"),
    [("cft", ("MiniCPM-2B", "Phi-2", "Gemma-2B")), ("prompteol", ("OPT 13B", "LLaMA 30B"))],
)
def test_a_model_of_no_paper(tmp_path: Path, paper: str, others: tuple[str, ...]) -> None:
    made = Fabricated(tmp_path / "run", paper, "smollm2-135m")
    protocol = MTEB if paper == "cft" else SENTEVAL
    made.evaluate("evaluate", 0.2, protocol)
    text, _ = made.report()
    assert "with SmolLM2-135M-Instruct, which is **no model of the paper**" in text
    first, second = text.split("## Other models, for orientation only")
    assert "published |" not in first
    for name in others:
        assert f"{name} (another model), published" in second
        assert name not in first.split("## Set by set")[1].split("### Notes")[0]
    ours = row_of(first, "STS12")[3 if paper == "cft" else 4]
    assert row_of(second, "STS12")[1] == ours
    if paper == "cft":
        assert row_of(second, "STS12")[2:5] == ["76.38", "61.62 ‡", "75.80 †"]
        assert "‡ Phi-2: a known bug" in second
        assert "† Not verified" in first


def test_a_size_without_a_fine_tuned_figure(tmp_path: Path) -> None:
    text, _ = Fabricated(tmp_path / "run", "prompteol", "opt-125m").report()
    assert row_of(text, "**mean**")[2:8] == [
        "not run",
        "67.00 †",
        "not run",
        "67.46",
        "not run",
        "-",
    ]
    assert "No fine-tuned figures of OPT 125M are published" in text
