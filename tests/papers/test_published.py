"""The published figures: complete, consistent in themselves, and marked for what they rest on."""

from __future__ import annotations

import statistics

import pytest
from pydantic import ValidationError

from lowmem_cft.evaluation.sts.protocols import PROTOCOLS
from lowmem_cft.evaluation.transfer.tasks import SPECS
from lowmem_cft.papers import published
from lowmem_cft.papers.published import Published
from lowmem_cft.papers.request import PAPERS


def every_row() -> list[Published]:
    return [row for paper in PAPERS.values() for row in paper.rows]


def row_of(paper: str, model: str, variant: published.Variant) -> Published:
    row = PAPERS[paper].published(model, variant)
    assert row is not None
    return row


def test_all_rows_are_there() -> None:
    rows = every_row()
    counts = {
        variant: sum(row.variant == variant for row in rows if row.paper == "prompteol")
        for variant in ("base", "icl", "fine-tuned", "transfer")
    }
    assert counts == {"base": 8, "icl": 8, "fine-tuned": 7, "transfer": 10}
    assert sum(row.paper == "cft" for row in rows) == 6


def test_sets_are_those_of_the_protocol_or_the_tasks() -> None:
    for row in every_row():
        if row.variant == "transfer":
            names = set(SPECS)
        else:
            protocol = PROTOCOLS[PAPERS[row.paper].facts.protocol]
            names = {entry.name for entry in protocol.sets}
        if row.model == "gemma-2b":
            assert set(row.sets) < names
            assert row.note
        else:
            assert set(row.sets) == names, (row.model, row.variant)


def test_means_recompute() -> None:
    """To a hundredth, but for the two rows that cannot: Gemma's five sets, and 2.7B without ICL."""
    checked = 0
    for row in every_row():
        mean = statistics.fmean(figure.value for figure in row.sets.values())
        if (row.model, row.variant) == ("opt-2.7b", "base"):
            assert row.mean is not None
            assert (mean, row.mean.value) == (pytest.approx(69.44, abs=0.005), 69.30)
            assert "69.44" in row.note
        elif row.model != "gemma-2b":
            assert row.mean is not None
            assert row.mean.value == pytest.approx(mean, abs=0.01), (row.model, row.variant)
            checked += 1
    assert checked == 36


def test_mean_without_a_demonstration_is_that_with_one_less_the_gain() -> None:
    sizes = [key for key in PAPERS["prompteol"].facts.models if key.startswith("opt")]
    assert len(sizes) == 8
    for model in sizes:
        icl, base = row_of("prompteol", model, "icl"), row_of("prompteol", model, "base")
        assert icl.demonstration is not None
        assert icl.mean is not None
        assert base.mean is not None
        assert base.mean.value == pytest.approx(icl.mean.value - icl.demonstration.improve)
        assert 1 <= icl.demonstration.line <= 300


def test_the_spread_that_is_quoted_is_over_sets() -> None:
    values = [figure.value for figure in row_of("cft", "minicpm-2b", "fine-tuned").sets.values()]
    assert statistics.pstdev(values) == pytest.approx(4.27, abs=0.005)
    assert any("spread over the nine sets" in note for note in PAPERS["cft"].facts.notes)


def test_known_figures() -> None:
    assert row_of("cft", "phi-2", "fine-tuned").sets["STS17"].value == 80.20
    assert row_of("prompteol", "opt-1.3b", "fine-tuned").sets["STSBenchmark-test"].value == 87.71
    assert row_of("prompteol", "llama-65b", "transfer").sets["TREC"].value == 97.40
    assert PAPERS["prompteol"].published("opt-125m", "fine-tuned") is None


def test_what_is_verified() -> None:
    """Figures copied at second hand, or reckoned from others, are not; their source says so."""
    for row in every_row():
        figures = list(row.sets.values()) + ([row.mean] if row.mean else [])
        for figure in figures:
            unread = any(words in figure.source for words in ("second hand", "less what"))
            assert figure.verified is not unread
    assert all(figure.verified for figure in row_of("cft", "minicpm-2b", "base").sets.values())
    assert not any(
        figure.verified for figure in row_of("cft", "gemma-2b", "fine-tuned").sets.values()
    )
    base = row_of("prompteol", "opt-6.7b", "transfer")
    assert not any(figure.verified for figure in base.sets.values())
    assert base.mean is not None
    assert base.mean.verified


def test_phi_2_alone_rests_on_a_bug() -> None:
    with_bug = {(row.model, row.variant) for row in every_row() if row.bug}
    assert with_bug == {("phi-2", "base"), ("phi-2", "fine-tuned")}
    bug = row_of("cft", "phi-2", "fine-tuned").bug
    assert "end-of-sequence" in bug
    assert "149" in bug
    assert "more than 70.89" in bug


def test_models_are_those_with_a_recipe() -> None:
    """But for LLaMA 65B, which has transfer figures only, and our own stand-in."""
    for paper in PAPERS.values():
        models = set(paper.facts.models)
        assert models - set(paper.recipes) <= {"llama-65b"}
        assert set(paper.recipes) - models == {"smollm2-135m"}
        assert {row.model for row in paper.rows} <= models


def test_damaged_rows() -> None:
    row = {
        "paper": "cft",
        "model": "m",
        "variant": "base",
        "source": "s",
        "numbers": {"STS12": 1.0},
    }

    def check(*rows: dict[str, object]) -> None:
        published._File.model_validate(
            {"sources": {"s": {"text": "somewhere"}}, "rows": list(rows)}
        )

    check(row)
    for wrong in ({"typo": 1}, {"numbers": {"STS12": 101.0}}, {"variant": "other"}):
        with pytest.raises(ValidationError):
            check({**row, **wrong})
    with pytest.raises(ValidationError, match="twice"):
        check(row, row)
