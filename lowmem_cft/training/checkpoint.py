"""A run's checkpoint: all that going on needs, written whole and checked when read."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowmem_cft.files import read_json, sha256_of, whole_folder, write_json
from lowmem_cft.machine import library_versions
from lowmem_cft.run_folder import RunFolder


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
            sums = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
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
    anew = "start anew with `overwrite`"
    keys = ("step", "progress", "plan")
    record = read_json(folder / "state.json", anew, "sha256", *keys)
    for name, wanted in record["sha256"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != wanted:
            raise ValueError(f"{folder / name} is damaged (its checksum differs); {anew}")
    tensors = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    adapter = load_file(str(folder / "adapter.safetensors"))
    values = {key: record[key] for key in keys}
    return TrainingState(adapter=adapter, **values, **tensors)
