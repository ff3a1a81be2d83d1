"""An export, whole and checked or not at all: of a model in memory, and of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lowmem_cft.exporting.check import ExportCheck, checked
from lowmem_cft.exporting.layout import Kind, check_expressible, write_model
from lowmem_cft.files import whole_folder
from lowmem_cft.inference.loading import Embedder, load_model
from lowmem_cft.model.exported import RECORD
from lowmem_cft.progress import Says
from lowmem_cft.run_folder import RunFolder

_WAY_OUT: dict[Kind, str] = {
    "adapter": "the run itself is whole, and `eval` and `embed` take it",
    "merged": "16 bits round it too much; the run itself is whole: `eval` and `embed` take it, and "
    "`lowmem-cft export RUN` exports its adapter",
}


def is_export(target: Path) -> bool:
    """Whether the folder holds an export of ours."""
    return (target / RECORD).is_file()


def check_target(target: Path, *, overwrite: bool = False) -> None:
    """Refuse to replace a folder that is no export of ours, or an export without being told to.

    Raises:
        ValueError: the folder holds something.
    """
    if is_export(target):
        if not overwrite:
            raise ValueError(
                f"{target} holds an export already: replace it with `overwrite`, or choose another "
                "folder with `out`"
            )
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`out`: {target} exists and is no export of ours; choose another folder")


def export_model(
    embedder: Embedder,
    target: Path,
    kind: Kind,
    observer: Says,
    *,
    texts: Sequence[str] = (),
) -> ExportCheck | None:
    """Write a model for sentence-transformers and check it.

    `target` is replaced when the export has passed, and stays as it was if it has not.

    Args:
        texts: see `checked`.

    Raises:
        ValueError: there is no adapter, or the layout cannot express the recipe.
        RuntimeError: the export does not embed as the model.
        OSError: it cannot be written.
    """
    with whole_folder(target) as folder:
        write_model(embedder, folder, kind)
        return checked(folder, kind, embedder, observer, texts, way_out=_WAY_OUT[kind])


def export_run(
    run: Path,
    target: Path,
    kind: Kind,
    device: torch.device,
    observer: Says,
    *,
    overwrite: bool = False,
) -> None:
    """Write a finished run as a folder that SentenceTransformer(path) loads, and check it.

    Args:
        overwrite: replace an export of ours that is there.

    Raises:
        ValueError: it is no run folder, or not finished, or its recipe cannot be exported; the
            target holds something else, or an export that may not be replaced.
        RuntimeError: the export does not embed as the run's model.
    """
    folder = RunFolder(run)
    if not folder.recipe.is_file():
        raise ValueError(f"{run} is no run folder (no recipe.yaml in it)")
    check_target(target, overwrite=overwrite)
    loaded = load_model(str(run), device, observer.say)
    check_expressible(loaded.recipe)
    export_model(loaded, target, kind, observer)
