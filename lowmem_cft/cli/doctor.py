"""What this machine has for training, what is missing, and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from lowmem_cft.files import cache_folder

Level = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Finding:
    """`remedy` is a command or a setting; empty where nothing is to be done."""

    level: Level
    what: str
    found: str
    remedy: str = ""


def _package(name: str, needed: bool, purpose: str, install: str) -> Finding:
    try:
        return Finding("ok", name, version(name))
    except PackageNotFoundError:
        return Finding("missing" if needed else "note", name, f"absent: {purpose}", install)


def _device() -> list[Finding]:
    import torch

    from lowmem_cft.machine import choose_device, choose_dtype, dtype_name, free_bytes

    device = choose_device()
    dtype = dtype_name(choose_dtype("auto", device))
    free = f"{free_bytes(device) / 2**30:.1f} GiB free"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}), {free}"
        return [
            Finding("ok", "GPU", name),
            Finding("ok", "compute dtype", f"{dtype}, unless model.dtype of a recipe says"),
        ]
    remedy = ""
    if shutil.which("nvidia-smi"):
        remedy = "nvidia-smi is there but this torch has no CUDA: pip install a CUDA build of torch"
    threads = f"{torch.get_num_threads()} threads, {free}"
    return [
        Finding("note", "GPU", "none that torch can use: training runs on the CPU", remedy),
        Finding("ok", "CPU", f"{platform.processor() or platform.machine()}, {threads}"),
        Finding("ok", "compute dtype", f"{dtype}, unless model.dtype of a recipe says"),
    ]


TRITON_NEEDS = "triton needs a C compiler (gcc) and Python's headers (python3-dev)"


def _loss_path() -> Finding:
    import torch

    from lowmem_cft.machine import choose_device
    from lowmem_cft_kernels import choose_path
    from lowmem_cft_kernels.info_nce import why_not_triton

    emb_SD = torch.empty((256 + 512, 1024), device=choose_device())
    path = choose_path(emb_SD[:256], emb_SD[256:]).value
    outcome = f"by the {path} path (tried on 256 triplets of 1024 dimensions)"
    if not emb_SD.is_cuda or (reason := why_not_triton(emb_SD)) is None:
        return Finding("ok", "loss", outcome)
    return Finding("note", "loss", f"{outcome}, slower than triton's: {reason}", TRITON_NEEDS)


def _nf4() -> Finding:
    if importlib.util.find_spec("bitsandbytes") is None:
        return Finding("missing", "4-bit", "bitsandbytes is absent", "pip install bitsandbytes")
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from lowmem_cft.machine import choose_device

    weight = torch.linspace(-1, 1, 4096, device=choose_device()).view(64, 64)
    try:
        restored = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
    except (RuntimeError, OSError, NotImplementedError) as error:
        return Finding(
            "missing", "4-bit", f"does not run here: {error}", "pip install -U bitsandbytes"
        )
    error_share = float((restored - weight).abs().mean())
    return Finding(
        "ok", "4-bit", f"NF4 runs: weights come back with a mean error of {error_share:.3f}"
    )


def _places() -> list[Finding]:
    cache = cache_folder()
    folder = cache if cache.exists() else next(p for p in cache.parents if p.exists())
    free = shutil.disk_usage(folder).free / 2**30
    writable = os.access(folder, os.W_OK)
    level: Level = "ok" if writable and free > 2 else "missing"
    remedy = "" if level == "ok" else "set LOWMEM_CFT_CACHE to a folder with 2 GiB free"
    findings = [Finding(level, "cache", f"{cache}, {free:.0f} GiB free", remedy)]
    data = os.environ.get("LOWMEM_CFT_DATA")
    findings.append(
        Finding("ok", "data", data)
        if data and Path(data).is_dir()
        else Finding(
            "note",
            "data",
            f"LOWMEM_CFT_DATA is {data!r}, no folder: STS sets are not found",
            "export LOWMEM_CFT_DATA=FOLDER",
        )
    )
    return findings


def examine() -> list[Finding]:
    """Everything worth knowing before a run."""
    needed = ("torch", "transformers", "peft", "datasets", "scipy")
    findings = [Finding("ok", "python", platform.python_version())]
    findings += [_package(name, True, "needed", f"pip install {name}") for name in needed]
    findings += [*_device(), _loss_path()]
    findings += [_package("bitsandbytes", True, "no NF4", "pip install bitsandbytes"), _nf4()]
    findings.append(
        _package(
            "sentence-transformers", False, "exports go unchecked", "pip install lowmem-cft[check]"
        )
    )
    return findings + _places()
