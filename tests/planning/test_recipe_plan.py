"""`lowmem-cft plan` by its command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowmem_cft.cli import app as cli
from lowmem_cft.units import GIB


def plan_json(*arguments: str) -> dict[str, Any]:
    outcome = CliRunner().invoke(cli.app, ["plan", *arguments, "--json"])
    assert outcome.exit_code == 0, outcome.output
    plan: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
    return plan


def test_a_huge_batch_fits_a_small_card() -> None:
    """65,536 triplets of 2304 dimensions in 12 GiB: from the configuration alone."""
    plan = plan_json("cft-minicpm-2b", "--memory", "12GiB", "--set", "train.logical_batch=65536")
    parts = plan["peak_bytes"]
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    assert parts["total"] <= 12 * GIB
    # 2.4 billion weights in the layers at half a byte and 1/127 of one for their scales
    assert parts["weights_4bit"] == pytest.approx(40 * 61.06e6 * (0.5 + 1 / 63.5), rel=0.01)
    assert plan["max_logical_batch"][str(12 * GIB)] >= 65536
    sizes = [plan["max_logical_batch"][str(gib * GIB)] for gib in (6, 8, 12, 16, 24)]
    assert sizes == sorted(sizes)
    assert plan["plan"]["backward_tokens"] >= plan["longest_text_tokens"]


def test_plan_reads_data_that_is_at_hand(tiny_folder: Path) -> None:
    plan = plan_json(
        "demo",
        "--set",
        f"model.id={tiny_folder}",
        "--memory",
        "4GB",
        "--device",
        "cpu",
        "--set",
        "model.keep_layers=null",
    )
    assert plan["notes"] == []
    assert plan["limit_bytes"] == 4 * 10**9
    assert plan["tokens_per_step"] < plan["texts_per_step"] * plan["longest_text_tokens"] / 2
    assert plan["padded_tokens_per_step"] < 1.3 * plan["tokens_per_step"]


def test_a_folder_with_the_configuration_alone_is_enough(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)
    options = ("--set", "model.keep_layers=null", "--memory", "4GiB")
    plan = plan_json("demo", "--set", f"model.id={tmp_path}", *options)
    assert plan["plan"]["backward_tokens"] > 0
    (tmp_path / "config.json").unlink()
    for name in (str(tmp_path), "nobody/nothing"):
        outcome = CliRunner().invoke(
            cli.app, ["plan", "demo", "--set", f"model.id={name}", *options]
        )
        assert isinstance(outcome.exception, ValueError)
        assert "a folder with the model's config.json alone is enough" in str(outcome.exception)
    outcome = CliRunner().invoke(cli.app, ["plan", "--help"])
    assert "a folder with that file alone" in " ".join(outcome.output.split())
