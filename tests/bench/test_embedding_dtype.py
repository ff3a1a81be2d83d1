"""The script on what dtypes of embeddings cost: its figures at a small size."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from bench import embedding_dtype


def test_quick(capsys: pytest.CaptureFixture[str]) -> None:
    assert embedding_dtype.main(["--quick"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = said["rows"]
    dials = embedding_dtype.KINDS, embedding_dtype.MODES, embedding_dtype.TEMPERATURES
    assert len(rows) == math.prod(map(len, dials))
    assert said["bf16_from"].keys() == {"drawn 576", "apart 576"}
    assert 1 / 1.1 < said["split_ratio"] < 1.1
    assert 1.2 < said["split_high_ratio"] < 4
    for row in rows:
        error = row["error"]
        for i in (0, 1):
            assert 0 < error["fp32"][i] < error["fp16"][i] < error["bf16"][i]
            assert 5e-4 < error["yardstick"][i] < error["split_high"][i] <= 1.1 * error["bf16"][i]


def test_geometry() -> None:
    """Cosines are as the script says."""
    batch = embedding_dtype.drawn("drawn", (256, 512), 576)
    cosine_MN = batch.query_MD @ batch.doc_ND.T
    positive_M = cosine_MN.diagonal()
    assert 0.6 <= float(positive_M.min()) < 0.62
    assert 0.88 < float(positive_M.max()) <= 0.9
    doc_NN = batch.doc_ND @ batch.doc_ND.T
    others = doc_NN[~torch.eye(512, dtype=torch.bool)]
    assert 0.28 < float(others.median()) < 0.32
    assert 0.01 < float((others > 0.5).float().mean()) < 0.06
    assert torch.allclose(batch.query_MD.norm(dim=1), torch.ones(256))


def test_from_which_temperature_on() -> None:
    def row(temperature: float, ratio: float) -> dict[str, Any]:
        by_yardstick = {"bf16": ratio}
        return {
            "embeddings": "drawn",
            "D": 8,
            "temperature": temperature,
            "by_yardstick": by_yardstick,
        }

    ratios = {0.01: 3.0, 0.02: 1.5, 0.03: 2.5, 0.05: 2.0, 0.1: 1.4}
    rows = [row(*pair) for pair in ratios.items()]
    assert embedding_dtype.bf16_from(rows) == {"drawn 8": 0.05}
    assert embedding_dtype.bf16_from([*rows, row(0.1, 2.1)]) == {"drawn 8": None}
