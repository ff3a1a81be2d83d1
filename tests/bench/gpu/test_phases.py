"""A sample of a step's chunks."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import phases
from lowmem_cft.data.chunks import Chunk
from lowmem_cft.gradient.plan import StepPlan


def test_a_sample_has_the_longest_chunk_and_all_kept_ones() -> None:

    plan = StepPlan(backward_tokens=8, forward_tokens=8, kept_tokens=17)
    tokens = [8, 8, 6, 6, 6, 4, 4]
    chunks = [Chunk(torch.tensor([2 * i, 2 * i + 1]), n) for i, n in enumerate(tokens)]
    sample = phases.Sample(3, plan)
    # of 8 + 8 kept tokens none is left out; of the others the first and the fourth is taken
    assert sample.choose(chunks) == [chunks[i] for i in (0, 1, 2, 5)]
    assert sample.share == (8 + 8 + 6 + 4) / 42
    assert sample.scale == (6 + 6 + 6 + 4 + 4) / (6 + 4)
    seconds = {"embedding": 1.0, "kept_embedding": 2.0, "loss": 3.0, "backward": 10.0}
    assert sample.whole(seconds) == pytest.approx(1 * 2.6 + 2 + 3 + 10 * 2.6)
    emb_RD = torch.full((5, 6), torch.nan)
    sample.fill(emb_RD, torch.tensor([0, 7, 12, 13, 4]))
    assert emb_RD.isnan().all(dim=1).tolist() == [True, False, False, False, True]
    torch.testing.assert_close(emb_RD[1:4].norm(dim=1), torch.ones(3))
