"""Whether a model can be there at all by its name, told before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from lowmem_cft.files import nearest_names
from lowmem_cft.model.sources import EMBEDDED


def check_model_name(name: str) -> None:
    """Refuse the name of a local file or folder that does not exist.

    A name of a hub's form, `organisation/model`, is a local one in `runs` and in a folder that holds
    runs; of any other such name the hub has to be asked.

    Raises:
        ValueError: there is no such file or folder, and the message has the nearest names; or it is a
            file of another kind.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{name} is a file, wanted a model's folder, a .gguf file or a hub id")
    if name.strip() and (name == EMBEDDED or path.exists()):
        return
    looks_local = path.suffix == ".gguf" or name[:1] in (".", "/", "~") or name.count("/") > 1
    if not name.strip() or looks_local or _holds_runs(path.parent):
        raise ValueError(f"{name or 'the model'} does not exist; {nearest_names(path)}")


def _holds_runs(folder: Path) -> bool:
    return folder == Path("runs") or (folder != Path() and any(folder.glob("*/recipe.yaml")))
