"""A run's checkpoint: all that going on needs, written whole and checked when read."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_cft.files import read_json, sha256_of, whole_folder, write_json
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.machine import library_versions
from lowmem_cft.run_folder import RunFolder
from lowmem_cft.training.records import Progress

_TENSORS = ("optimizer", "scheduler", "scaler", "temperature")
"""Parts of a `TrainingState` that torch writes."""

_START_ANEW = "start anew with `overwrite`"


@dataclass
class TrainingState:
    """All that going on needs besides the recipe and the base model.

    `optimizer`, `scheduler` and `scaler` are what `state_dict` of each gives. `plan` is the step
    plan as it was: the same plan rounds the same way. `temperature` is the state of
    `LearnedTemperature`, empty where the temperature is not trained. `rows_sha256` has a checksum of
    the rows of each source; older versions kept none.
    """

    step: int
    adapter: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any]
    progress: Progress
    plan: StepPlan
    temperature: dict[str, Tensor] = field(default_factory=dict)
    rows_sha256: list[str] = field(default_factory=list)


class _StateRecord(BaseModel):
    """state.json: what is not a tensor, and the checksums of the other files by name."""

    step: int
    progress: Progress
    plan: StepPlan
    versions: dict[str, str]
    sha256: dict[str, str]
    rows_sha256: list[str] = []


def adapter_state(peft_model: torch.nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under peft's names, on the CPU."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def load_adapter_state(peft_model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Put the adapter's tensors back."""
    from peft import set_peft_model_state_dict

    outcome = set_peft_model_state_dict(peft_model, state)
    assert not outcome.unexpected_keys, f"adapter names: {outcome.unexpected_keys[:3]}"


def save_adapter(peft_model: Any, folder: Path, card: str) -> None:
    """Write the adapter as peft loads it, with a card in the place of peft's unfilled one.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    with whole_folder(folder) as unfinished:
        peft_model.save_pretrained(unfinished, save_embedding_layers=False)
        (unfinished / "README.md").write_text(card, encoding="utf-8")


def save_state(run: RunFolder, state: TrainingState) -> None:
    """Write the checkpoint whole; the last one stays if anything fails.

    Raises:
        RuntimeError: it could not be written.
    """
    try:
        with whole_folder(run.checkpoint) as folder:
            save_file(state.adapter, str(folder / "adapter.safetensors"))
            torch.save({name: getattr(state, name) for name in _TENSORS}, folder / "optimizer.pt")
            record = _StateRecord(
                step=state.step,
                progress=state.progress,
                plan=state.plan,
                versions=library_versions(),
                rows_sha256=state.rows_sha256,
                sha256={file.name: sha256_of(file) for file in sorted(folder.iterdir())},
            )
            write_json(folder / "state.json", record.model_dump())
    except (OSError, RuntimeError) as error:
        last = "the last checkpoint is kept" if run.checkpoint.is_dir() else "none was kept"
        free = shutil.disk_usage(run.path).free / 2**20
        raise RuntimeError(
            f"could not save {run.checkpoint} ({error}; {free:.1f} MiB free on that disk); {last}"
        ) from error


def load_state(run: RunFolder) -> TrainingState:
    """Read the checkpoint back, checking its sums.

    Raises:
        ValueError: a file is damaged.
    """
    folder = run.checkpoint
    record = _read_record(run)
    for name, checksum in record.sha256.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != checksum:
            raise ValueError(f"{folder / name} is damaged (its checksum differs); {_START_ANEW}")
    tensors = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    return TrainingState(
        step=record.step,
        adapter=load_file(str(folder / "adapter.safetensors")),
        progress=record.progress,
        plan=record.plan,
        rows_sha256=record.rows_sha256,
        **tensors,
    )


def saved_step(run: RunFolder) -> int | None:
    """The step of the checkpoint; None where there is none that can be read."""
    try:
        return _read_record(run).step
    except ValueError:
        return None


def _read_record(run: RunFolder) -> _StateRecord:
    path = run.checkpoint / "state.json"
    required = (name for name, field in _StateRecord.model_fields.items() if field.is_required())
    values = read_json(path, _START_ANEW, *required)
    try:
        return _StateRecord.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is damaged ({key}: {first['msg']}); {_START_ANEW}") from error
