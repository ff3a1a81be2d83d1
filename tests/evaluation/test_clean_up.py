"""The text clean-up against the published rule, text by text."""

from __future__ import annotations

import pytest

from lowmem_cft.evaluation.clean_up import clean_up


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a man runs", "a man runs."),
        ("a man runs.", "a man runs."),
        ("does he run?", "does he run."),
        ('he said "run"', "he said 'run'"),
        ("'run'", "'run'"),
        ('"run" he said', "'run' he said."),
        ("run!", "run!."),
        ("", ""),
    ],
)
def test_clean_up(text: str, cleaned: str) -> None:
    """As the rule in the paper's evaluation.py gives for each text by hand."""
    assert clean_up(text) == cleaned
