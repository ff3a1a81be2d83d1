"""Where things lie in a run's folder.

recipe.yaml    the resolved recipe
log.jsonl      a line for each step
checkpoint/    adapter, optimizer, schedule, step: all that going on needs
best/          the best-scoring adapter, where the recipe keeps it
adapter/       the final adapter
metrics.json   scores before and after, speed, peak memory
model/         the exported model, which SentenceTransformer(path) loads
eval-*.json    reports of `eval`, named by what was scored and how
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def replaced(self) -> Path:
        """Where the run that `overwrite` replaces waits until the new one has begun."""
        return self.path.with_name(f"{self.path.name}.replaced")

    def begun(self) -> None:
        """Remove the run that this one replaces: the new one can do its work."""
        shutil.rmtree(self.replaced, ignore_errors=True)

    def withdraw(self) -> None:
        """Remove the folder if it holds nothing but the recipe, and put the replaced run back."""
        if [entry.name for entry in self.path.iterdir()] == [self.recipe.name]:
            shutil.rmtree(self.path)
            if self.replaced.is_dir():
                self.replaced.rename(self.path)
