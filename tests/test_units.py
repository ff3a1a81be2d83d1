"""Amounts of memory."""

from __future__ import annotations

import pytest

from lowmem_cft.units import parse_bytes


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12GiB", 12 * 2**30),
        ("12gib", 12 * 2**30),
        (" 11.5 GB ", 11_500_000_000),
        ("800M", 800_000_000),
        ("1.5KiB", 1536),
        ("12B", 12),
        ("2Ti", 2 * 2**40),
    ],
)
def test_amounts_that_are_read(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["12", "11.5", "12i"])
def test_a_number_needs_a_unit(text: str) -> None:
    with pytest.raises(ValueError, match=rf"got '{text}' without a unit, wanted one, such as"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "much", "0GiB", "-1GiB", "1e3MiB", "12 apples", "GiB"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ValueError, match="wanted an amount of memory such as 12GiB"):
        parse_bytes(text)
