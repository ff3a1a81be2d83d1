"""What the loss's Triton kernels take of a GPU: measured, and as written down.

`python tests/loss_resources.py` measures and writes `tests/kernels/resources.json` anew: after a
change of the kernels, of the tiles or of the pinned triton. Read the difference before it is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from compiling import Resources, compile_for
from launches import recorded
from loss_cases import Settings, make_case
from lowmem_cft_kernels import LossPath, Products

WRITTEN = Path(__file__).parents[1] / "kernels" / "resources.json"

_MASKS: Settings = frozenset(
    {
        "symmetric",
        "several positives",
        "own negatives",
        "two keys",
        "absolute margin",
        "in-batch hardness",
        "weights",
        "normalize",
    }
)
SETTINGS: dict[str, Settings] = {
    "one-way": frozenset({"two keys"}),
    "symmetric": frozenset({"two keys", "symmetric", "normalize"}),
    "masks": _MASKS,
    "everything": _MASKS | {"guides"},
}
"""Plain blocks with one pass and with two, middle ones and heavy ones (`tiles.load_of`)."""

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "split": torch.float32,  # multiplied as halves in bfloat16
}

Target = tuple[int, str, str]
"""Compute capability, dtype, name of the settings."""


def targets() -> Iterator[Target]:
    """bfloat16 takes what float16 does, and 8.9 what 8.6 does: they are tried once each."""
    for capability in (75, 80, 86, 90, 100, 120):
        for dtype in ("fp16", "fp32"):
            yield from ((capability, dtype, name) for name in SETTINGS)
    yield from ((capability, "bf16", "symmetric") for capability in (80, 90, 100, 120))
    yield from ((89, "bf16", name) for name in SETTINGS)
    for capability in (80, 86, 89, 90, 100, 120):
        yield from ((capability, "split", name) for name in SETTINGS)


def measure(target: Target) -> dict[str, Resources]:
    """The resources of each kernel that the loss launches."""
    capability, dtype, settings = target
    case = make_case(SETTINGS[settings], (64, 128, 64), DTYPES[dtype])
    if dtype == "split":
        case = case.having(products=Products.SPLIT_BF16)
    with recorded(capability) as kernels:
        case.run(LossPath.TRITON)
    by_kernel = {}
    for kernel, recorder in kernels.items():
        # sums of rows come with a tally, those of columns do not
        most = 2 if kernel == "merge_kernel" else 1
        assert len(recorder.launches) <= most, f"{kernel} is compiled more than {most} times"
        for launch, name in zip(recorder.launches, (kernel, f"{kernel}-2"), strict=False):
            by_kernel[name] = compile_for(
                recorder.kernel,
                capability,
                launch.types,
                launch.constants,
                divisible=launch.divisible,
                options=launch.options,
            )
    return by_kernel


def key(target: Target, kernel: str) -> str:
    """Under which it is written down."""
    capability, dtype, name = target
    return f"sm_{capability} {dtype} {name} {kernel}"


def numbers(resources: Resources) -> dict[str, int]:
    """Numbers as written down: nothing spills, so that stack and local memory are not."""
    written = ("registers", "shared", "threads", "mma", "async_copies")
    return {name: asdict(resources)[name] for name in written}


def written() -> dict[str, Any]:
    """{"triton": its version, "kernels": {key: numbers}}."""
    content: dict[str, Any] = json.loads(WRITTEN.read_text(encoding="utf-8"))
    return content


def rewrite() -> None:
    """Measure everything; nothing is written where something does not fit."""
    lines = []
    for target in targets():
        for kernel, resources in measure(target).items():
            resources.check()
            lines.append(f"  {json.dumps(key(target, kernel))}: {json.dumps(numbers(resources))}")
    text = (
        f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n'
        + ",\n".join(lines)
        + "\n }\n}\n"
    )
    json.loads(text)
    WRITTEN.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    rewrite()
