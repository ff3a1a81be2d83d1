"""The loss's kernels compile for every supported GPU, none of which has to be here.

triton is imported plainly: where it is missing these tests fail, they are not skipped.
"""

from __future__ import annotations

import pytest
import triton

from loss_resources import Target, key, measure, numbers, targets, written

TARGETS = list(targets())
KERNELS = {
    True: {"lse_kernel", "merge_kernel", "scale_kernel"},
    False: {"lse_kernel", "merge_kernel", "merge_kernel-2", "gradient_kernel"},
}
"""Where only queries choose; otherwise sums of columns are merged too."""


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"sm_{t[0]}-{t[1]}-{t[2]}")
def test_resources(target: Target) -> None:
    capability, dtype, name = target
    expected = written()
    measured = measure(target)
    assert measured.keys() == KERNELS[name == "one-way"]
    for kernel, resources in measured.items():
        print(kernel, resources)
        resources.check()
        multiplies = kernel in ("lse_kernel", "gradient_kernel")
        # triton from 3.2 on has products on tensor cores from compute capability 8.0 on only
        on_tensor_cores = multiplies and dtype != "fp32" and capability >= 80
        assert bool(resources.mma) is on_tensor_cores
        assert bool(resources.async_copies) is (multiplies and capability >= 80)
        if triton.__version__ == expected["triton"]:
            wanted = expected["kernels"][key(target, kernel)]
            assert numbers(resources) == wanted, "see tests/loss_resources.py"


def test_what_is_written_down_is_what_is_measured() -> None:
    keys = written()["kernels"].keys()
    assert {k.rpartition(" ")[0] for k in keys} == {key(t, "").strip() for t in TARGETS}
    assert len(keys) == sum(len(KERNELS[name == "one-way"]) for _, _, name in TARGETS)
