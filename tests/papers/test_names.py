"""Names that the papers share."""

from __future__ import annotations

from lowmem_cft.evaluation.sts.protocols import SETS
from lowmem_cft.papers import names


def test_the_set_of_development_has_so_many_pairs() -> None:
    assert SETS[names.DEV_SET].num_pairs == names.DEV_PAIRS
