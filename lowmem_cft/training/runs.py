"""A run's folder: what lies where in it, and writing so that nothing already written is lost.

recipe.yaml    the resolved recipe
log.jsonl      one line a step
checkpoint/    adapter, optimizer, schedule, step: all that going on needs
best/          the best-scoring adapter, where the recipe keeps it
adapter/       the final adapter
metrics.json   scores before and after, speed, peak memory
model/         the exported model, which SentenceTransformer(path) loads
eval-*.json    reports of `eval`, named by what was scored and how
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_cft.files import read_json, whole_folder
from lowmem_cft.recipe import schema as recipes

MAY_CHANGE = ("memory", "eval", "output")
"""Sections that a resumed run may change: they do not define what is trained."""


def library_versions() -> dict[str, str]:
    """Versions of what computes a run's numbers."""
    found = {"python": platform.python_version()}
    for name in ("lowmem-cft", "torch", "transformers", "peft", "bitsandbytes", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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
        """The new run can do its work: the one it replaces goes."""
        shutil.rmtree(self.replaced, ignore_errors=True)

    def withdraw(self) -> None:
        """Take the folder back if it holds nothing but the recipe, and put the old run back."""
        if [entry.name for entry in self.path.iterdir()] == [self.recipe.name]:
            shutil.rmtree(self.path)
            if self.replaced.is_dir():
                self.replaced.rename(self.path)


def open_run(recipe: recipes.Recipe, *, resume: bool, overwrite: bool) -> RunFolder:
    """Make, continue or replace the run's folder.

    Raises:
        ValueError: it exists and neither `resume` nor `overwrite` is given; nothing to resume; the
            recipe to resume with differs in what defines the run; or the folder is not writable.
    """
    assert recipe.output.name is not None, "recipes.load names the run"
    run = RunFolder(Path(recipe.output.folder) / recipe.output.name)
    if resume:
        _check_resumable(run, recipe)
        return run
    if run.path.exists() and not overwrite:
        raise ValueError(
            f"{run.path} exists: go on with --resume, replace it with --overwrite, or choose "
            "another name with --set output.name=NAME"
        )
    try:
        if run.path.exists():
            if not run.recipe.is_file() and any(run.path.iterdir()):
                raise ValueError(f"{run.path} is no run of ours, so --overwrite does not touch it")
            shutil.rmtree(run.replaced, ignore_errors=True)
            run.path.rename(run.replaced)
        run.path.mkdir(parents=True)
        run.recipe.write_text(recipes.to_yaml(recipe), encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"cannot write to {run.path} ({error.strerror}); choose another place with "
            "--set output.folder=FOLDER"
        ) from error
    return run


def _check_resumable(run: RunFolder, recipe: recipes.Recipe) -> None:
    before = run.checkpoint.with_name("checkpoint.old")
    if before.is_dir() and not run.checkpoint.is_dir():
        before.rename(run.checkpoint)  # killed between the two renames of a save
    if not run.checkpoint.is_dir():
        raise ValueError(
            f"{run.path} holds no checkpoint to resume: start it anew (with --overwrite if it exists)"
        )
    old = recipes.load(str(run.recipe))
    for section in type(recipe).model_fields:
        if section in MAY_CHANGE or getattr(old, section) == getattr(recipe, section):
            continue
        before, after = getattr(old, section).model_dump(), getattr(recipe, section).model_dump()
        changed = [key for key in before if before[key] != after[key]]
        raise ValueError(
            f"--resume: {section}.{changed[0]} was {before[changed[0]]!r} when {run.path} began and "
            f"is {after[changed[0]]!r} now; resume with the same values, or start a new run"
        )


def append_log(run: RunFolder, line: Mapping[str, Any]) -> None:
    with run.log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_log(run: RunFolder) -> list[dict[str, Any]]:
    if not run.log.is_file():
        return []
    lines = []
    for line in run.log.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # the half line of a run that was killed while writing it
            continue
    return lines


def truncate_log(run: RunFolder, step: int) -> None:
    """Drop the lines after `step`: a resumed run writes them again."""
    kept = [line for line in read_log(run) if line.get("step", 0) <= step]
    partial = run.log.with_name(run.log.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.replace(run.log)


_LONGEST = 60
"""Letters of a list of names in a file's name."""


def short_name(names: Sequence[str]) -> str:
    """A part of a file's name that tells lists of names apart.

    It is the names themselves, where they are short and of plain letters; else a checksum is in it.
    """
    joined = "-".join(names)
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", joined)
    if plain == joined and len(plain) <= _LONGEST:
        return plain
    digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{plain if len(plain) <= _LONGEST else f'{len(names)}-names'}-{digest}"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Written beside and renamed, so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


@dataclass
class TrainingState:
    """All that going on needs besides the recipe and the base model."""

    step: int
    adapter: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any]
    progress: dict[str, Any]
    """Plain values: scores so far, seconds spent, the best score and its step."""
    plan: dict[str, Any]
    """The step plan as it was: the same plan rounds the same way."""
    temperature: dict[str, Tensor] = field(default_factory=dict)
    """The state of `LearnedTemperature`; empty where the temperature is not trained."""


def save_state(run: RunFolder, state: TrainingState) -> None:
    """Write the checkpoint whole; the one before it stays if anything fails.

    Raises:
        RuntimeError: it could not be written.
    """
    from safetensors.torch import save_file

    try:
        with whole_folder(run.checkpoint) as folder:
            save_file(state.adapter, str(folder / "adapter.safetensors"))
            keys = ("optimizer", "scheduler", "scaler", "temperature")
            torch.save({key: getattr(state, key) for key in keys}, folder / "optimizer.pt")
            sums = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
            write_json(
                folder / "state.json",
                {
                    "step": state.step,
                    "progress": state.progress,
                    "plan": state.plan,
                    "versions": library_versions(),
                    "sha256": sums,
                },
            )
    except (OSError, RuntimeError) as error:
        kept = "the checkpoint before it is kept" if run.checkpoint.is_dir() else "none was kept"
        free = shutil.disk_usage(run.path).free / 2**20
        raise RuntimeError(
            f"could not save {run.checkpoint} ({error}; {free:.1f} MiB free on that disk); {kept}"
        ) from error


def load_state(run: RunFolder) -> TrainingState:
    """Read the checkpoint back, checking its sums.

    Raises:
        ValueError: a file is damaged.
    """
    from safetensors.torch import load_file

    folder = run.checkpoint
    anew = "start anew with --overwrite"
    keys = ("step", "progress", "plan")
    record = read_json(folder / "state.json", anew, "sha256", *keys)
    for name, wanted in record["sha256"].items():
        if not (folder / name).is_file() or _sha256(folder / name) != wanted:
            raise ValueError(f"{folder / name} is damaged (its checksum differs); {anew}")
    tensors = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    adapter = load_file(str(folder / "adapter.safetensors"))
    values = {key: record[key] for key in keys}
    return TrainingState(adapter=adapter, **values, **tensors)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
