"""What the GPU check's parts are given."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.device import matrix_peak
from bench.gpu.ballast import Ballast
from bench.harness import write_whole

MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "MiniCPM-2B": ("cft-minicpm-2b", ()),
    "Gemma-2B": ("cft-gemma-2b", ()),
    "Phi-2": ("cft-phi-2", ()),
    "LLaMA-8B": ("prompteol-llama-7b", ("lora.rank=16",)),
}
"""Name -> recipe whose adapter and loss are used, and what is changed of it."""


@dataclass
class Options:
    """What a part may ask.

    `seconds`: the part's budget, from `started` on. `rows`: triplets of the memory proof's step,
    which should take `step_seconds` at most. `ballast`: beside which the part runs. `result`: where
    `note` writes what the part has so far, which is `noted`. `picture`: where one may be drawn.
    """

    device: torch.device
    tiny: bool
    cap_bytes: int
    seconds: float
    rows: int = 65536
    step_seconds: float | None = None
    models: tuple[str, ...] = ()
    result: Path | None = None
    picture: Path | None = None
    ballast: Ballast | None = None
    started: float = field(default_factory=time.perf_counter)
    noted: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.perf_counter() - self.started)

    def note(self, results: Mapping[str, Any]) -> None:
        """Keep this beside what was noted before: all there is if the part does not end."""
        self.noted.update(results)
        if self.result is not None:
            write_whole(self.result, {**self.noted, "unfinished": True})


def context_bytes(options: Options) -> int:
    """Bytes of the GPU in use beside this process's allocator; 0 on a CPU."""
    if not options.cuda:
        return 0
    free, total = torch.cuda.mem_get_info(options.device)
    return int(total - free - torch.cuda.memory_reserved(options.device))


def bf16_peak(options: Options) -> float:
    """FLOP/s of a large bf16 product."""
    return matrix_peak(torch.bfloat16, options.device, 512 if options.tiny else None)
