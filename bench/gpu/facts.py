"""What the GPU check says about the machine, its software, and what happened on the card."""

from __future__ import annotations

import subprocess
import threading
from types import TracebackType
from typing import Any

import torch

from bench.harness import versions

LIBRARIES = (
    "lowmem-cft",
    "torch",
    "triton",
    "transformers",
    "peft",
    "bitsandbytes",
    "numpy",
    "pydantic",
    "sentence-transformers",
    "memeff",
    "inf-cl",
    "cut-cross-entropy",
    "liger-kernel",
)

_BETWEEN = 0.05
"""Seconds from one look at the card to the next."""


def software() -> dict[str, Any]:
    """Versions of Python and the libraries, of CUDA as torch was built for it, and the driver."""
    driver = nvidia_smi("driver_version")
    return versions(LIBRARIES) | {"cuda": torch.version.cuda, "driver": driver}


def nvidia_smi(field: str) -> str | None:
    """One field of the first GPU, as text; None where the tool is not there or refuses."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def card_facts(device: torch.device) -> dict[str, Any]:
    """Size and architecture of the GPU; empty on a CPU."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "total_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def used_bytes(device: torch.device) -> int:
    """Bytes of the card in use by all processes, contexts included; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def allocator_counts(device: torch.device) -> dict[str, int]:
    """How often the allocator had to give its cache back to go on, and how often that failed."""
    if device.type != "cuda":
        return {"num_alloc_retries": 0, "num_ooms": 0}
    counts = torch.cuda.memory_stats(device)
    return {key: int(counts.get(key, 0)) for key in ("num_alloc_retries", "num_ooms")}


class OnCard:
    """While entered, watches the card from a thread, and counts the allocator's troubles.

    Attributes:
        card_bytes: most in use on the whole card, beyond `others` bytes of other processes.
        counts: by how much `allocator_counts` rose.
    """

    def __init__(self, device: torch.device, others: int = 0) -> None:
        self.device, self.others = device, others
        self.card_bytes = 0
        self.counts: dict[str, int] = {}
        self._over = threading.Event()

    def __enter__(self) -> OnCard:
        self._before = allocator_counts(self.device)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        self.card_bytes = max(self.card_bytes, used_bytes(self.device) - self.others)

    def _watch(self) -> None:
        while not self._over.wait(_BETWEEN):
            self._look()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        self._look()  # the allocator's cache, which is as large as at the peak, is still there
        after = allocator_counts(self.device)
        self.counts = {key: after[key] - self._before[key] for key in after}
