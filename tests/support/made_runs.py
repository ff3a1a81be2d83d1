"""Records of runs that were never run."""

from __future__ import annotations

from typing import Any

from lowmem_cft.evaluation.sts.score import SetScore
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.training.records import Metrics

SCORE = SetScore("a", 0.5, 3, None, "a.tsv", 0.4, "sha256:1", False)


def made_metrics(**changes: Any) -> Metrics:
    values = {
        "before": [SCORE],
        "after": [SCORE],
        "protocol": "cosine",
        "steps": 2,
        "rows": 8,
        "train_seconds": 1.5,
        "rows_per_s": None,
        "tokens_per_s": 3.0,
        "plan": StepPlan(backward_tokens=64, forward_tokens=128),
        "peak_bytes": 1,
        "device": "CPU",
        "versions": {"python": "3.11"},
    }
    return Metrics(**{**values, **changes})
