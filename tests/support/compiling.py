"""Compile Triton kernels for GPUs that are not here and read what they would take of one.

The assembler and `cuobjdump` come with triton; no driver, GPU or C compiler is needed.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory one block may ask for, bytes: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability", maximum amount of shared memory per thread block.
SHARED_LIMIT = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
REGISTER_FILE = 64 * 1024
"""32-bit registers of one multiprocessor, the same for all of these."""

_MMA = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_ASYNC_COPY = re.compile(r"\bcp\.async\.(?:ca|cg|bulk)\b")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes: registers per thread, bytes of stack and local memory, shared bytes.

    Registers that do not fit are spilled to the stack (STACK) or to local memory (LOCAL). `mma` and
    `async_copies` count instructions in the PTX: products on tensor cores, and copies to shared
    memory that a thread does not wait for.
    """

    capability: int
    registers: int
    stack: int
    local: int
    shared: int
    threads: int
    mma: int = 0
    async_copies: int = 0

    def check(self) -> None:
        """Assert that nothing spills and that one block fits a multiprocessor."""
        assert self.stack == self.local == 0, f"spills: {self}"
        assert 0 < self.registers <= 255, f"no register count was read: {self}"
        assert self.registers * self.threads <= REGISTER_FILE, f"too many registers: {self}"
        limit = SHARED_LIMIT[self.capability]
        assert self.shared <= limit, f"shared memory, at most {limit}: {self}"


def compile_for(
    kernel: Any,
    capability: int,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    divisible: Collection[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Resources:
    """Compile a `triton.jit` kernel as a launch would, for compute capability 75, 80, ....

    It is compiled here and now: the user's cache is neither read nor filled.

    Args:
        types: triton's types of the arguments, `{"x_ptr": "*fp16", "count": "i32"}`.
        constants: values of the `tl.constexpr` arguments (and of those that are None).
        divisible: arguments that are multiples of 16; pointers of torch's allocator all are.
        options: of the launch, `{"num_warps": 8, "num_stages": 3}`; triton's defaults otherwise.

    Raises:
        ValueError: `types` and `constants` do not name each argument once, or `divisible` names
            none of `types`.
    """
    names = list(kernel.arg_names)
    if sorted([*types, *constants]) != sorted(names) or not set(divisible) <= set(types):
        raise ValueError(
            f"arguments: got types of {list(types)}, constants {list(constants)}, divisible "
            f"{list(divisible)}; wanted each of {names} once"
        )
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
    ):
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options=dict(options or {}),
        )
    usage = _usage(compiled.asm["cubin"])
    return Resources(
        capability=capability,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        # cuobjdump counts static shared memory only; triton asks for its own at launch
        shared=max(usage["SHARED"], compiled.metadata.shared),
        threads=32 * compiled.metadata.num_warps,
        mma=len(_MMA.findall(compiled.asm["ptx"])),
        async_copies=len(_ASYNC_COPY.findall(compiled.asm["ptx"])),
    )


def _usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of the one function in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s*(REG:\d+ .*)$", text, flags=re.MULTILINE)
    assert len(lines) == 1, f"wanted one function, got:\n{text}"
    usage = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", lines[0])}
    assert {"REG", "STACK", "SHARED", "LOCAL"} <= usage.keys(), text
    return usage
