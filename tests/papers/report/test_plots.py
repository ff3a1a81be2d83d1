"""Plots of the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fabricated import (
    Fabricated,
    read_text,
)
from lowmem_cft.papers.report.plots import EFFICIENCY, LOSSES, NAMES, SETS, running_mean


def test_plots_are_pngs(phi: Fabricated) -> None:
    from matplotlib import image

    text = read_text(phi)
    for name in NAMES:
        path = phi.folder / "report" / name
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert f"]({name})" in text
        pixels = image.imread(path)
        assert pixels.shape[:2] == (660, 1200)
        assert len(np.unique(pixels[..., 0])) > 50
        assert np.mean(pixels[..., 0] < 0.9) > 0.005


def test_only_plots_that_have_figures(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "cft", "minicpm-2b")
    made.evaluate("base", 0.8)
    text, _ = made.report()
    assert SETS in text
    assert EFFICIENCY not in text
    assert LOSSES not in text
    assert not (made.folder / "report" / LOSSES).exists()


def test_running_mean() -> None:
    assert running_mean([4.0, 2.0, 0.0, 1.0], 2).tolist() == [4.0, 3.0, 1.0, 0.5]
    assert running_mean([4.0, 2.0], 1).tolist() == [4.0, 2.0]
    assert running_mean([4.0, 2.0], 3).tolist() == [4.0, 3.0]
