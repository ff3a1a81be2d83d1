"""The dropout kernel compiles for every supported GPU, none of which has to be here.

triton is imported plainly: where it is missing these tests fail, they are not skipped.
"""

from __future__ import annotations

import pytest
import triton
import triton.language as tl

from compiling import Resources, compile_for
from lowmem_cft_kernels import triton_dropout

TARGETS = [
    pytest.param(capability, dtype, id=f"sm_{capability}-{dtype}")
    for capability in (75, 80, 86, 89, 90, 100, 120)
    for dtype in ("fp32", "fp16", "bf16")
    if (capability, dtype) != (75, "bf16")  # Turing has no bfloat16
]


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
def test_dropout(capability: int, dtype: str, wide: bool) -> None:
    pointers = {
        "x_ptr": f"*{dtype}",
        "key_l_ptr": "*i32",
        "key_f_ptr": "*i32",
        "out_ptr": f"*{dtype}",
    }
    scalars = {"num_tokens": "i32", "num_features": "i32", "threshold": "i32", "scale": "fp32"}
    resources = compile_for(
        triton_dropout.dropout_kernel,
        capability,
        pointers | scalars,
        {"WIDE": wide, "BLOCK_L": triton_dropout.BLOCK_L, "BLOCK_F": triton_dropout.BLOCK_F},
        divisible=[*pointers, "num_features"],
        options=triton_dropout.LAUNCH,
    )
    print(resources)
    resources.check()
    assert resources.registers <= 64, "fewer than 8 blocks of 128 threads would fit"
    assert resources.shared <= 1024, "tiles should never pass through shared memory"


# --- the checks find what they look for -------------------------------------------------------


@triton.jit
def _centre_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Holds BLOCK values in the registers of one warp until all are summed."""
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index)
    tl.store(out_ptr + index, x - tl.sum(x, 0))


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    """One tile of a @ b with its operands in shared memory."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a = tl.load(a_ptr + row * BLOCK + column)
    b = tl.load(b_ptr + row * BLOCK + column)
    tl.store(out_ptr + row * BLOCK + column, tl.dot(a, b))


def test_spills_are_found() -> None:
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32"}
    resources = compile_for(_centre_kernel, 80, types, {"BLOCK": 2**14}, options={"num_warps": 1})
    with pytest.raises(AssertionError, match="spills"):
        resources.check()


def test_shared_memory_of_a_launch_is_counted() -> None:
    types = {"a_ptr": "*fp16", "b_ptr": "*fp16", "out_ptr": "*fp32"}
    resources = compile_for(_matmul_kernel, 80, types, {"BLOCK": 64}, divisible=types)
    assert resources.shared >= 2 * 64 * 64 * 2
    resources.check()


def test_instructions_are_counted() -> None:
    types = {"a_ptr": "*fp16", "b_ptr": "*fp16", "out_ptr": "*fp32"}
    for capability, on_tensor_cores in ((75, False), (80, True), (90, True)):
        resources = compile_for(_matmul_kernel, capability, types, {"BLOCK": 64}, divisible=types)
        assert bool(resources.mma) is on_tensor_cores
        assert not resources.async_copies, "there is no loop to copy ahead in"


def test_a_block_that_does_not_fit_is_found() -> None:
    fits = Resources(capability=75, registers=128, stack=0, local=0, shared=2**16, threads=512)
    fits.check()
    for registers, shared, message in (
        (129, 0, "too many registers"),
        (128, 2**16 + 1, "shared memory"),
        (0, 0, "no register count"),
    ):
        with pytest.raises(AssertionError, match=message):
            Resources(75, registers, 0, 0, shared, 512).check()


def test_arguments_named_wrongly() -> None:
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32"}
    for wrong in ({}, {"BLOCK": 16, "x_ptr": 1}, {"BLOCK": 16, "other": 1}):
        with pytest.raises(ValueError, match=r"wanted each of \['x_ptr', 'out_ptr', 'BLOCK'\]"):
            compile_for(_centre_kernel, 80, types, wrong)
