"""The recipes that are listed."""

from __future__ import annotations

from running import Run


def test_recipes_lists_presets(command: Run) -> None:
    code, out, _ = command("recipes")
    assert code == 0
    assert "demo" in out.split()
