"""The Triton path of the loss walked through with its kernels recorded in place of run.

Neither a GPU nor triton's interpreter is needed. Recorded is what a launch depends on, no tensor:
what the path holds can be counted meanwhile.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_cft_kernels import tiles, triton_info_nce

KERNELS = ("lse_kernel", "merge_kernel", "gradient_kernel", "scale_kernel")

_OPTIONS = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion")

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
}


@dataclass(frozen=True)
class Launch:
    """What triton compiles a kernel for: see `compiling.compile_for`."""

    types: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...]
    options: Mapping[str, Any]


class Recorder:
    """Stands for a `triton.jit` kernel, and keeps the launches that differ."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.count = 0
        self.launches: list[Launch] = []
        self._unspecialized = [p.name for p in kernel.params if p.do_not_specialize]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < size < 2**31 for size in grid), grid
        return self._record

    def _record(self, **arguments: Any) -> None:
        self.count += 1
        options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
        types, constants, divisible = {}, {}, []
        for parameter in self.kernel.params:
            name = parameter.name
            value = arguments.pop(name)
            if parameter.is_constexpr or value is None:
                constants[name] = value
                continue
            types[name] = _type_of(value)
            if name not in self._unspecialized and _is_divisible(value):
                divisible.append(name)
        assert not arguments, f"the kernel does not take {list(arguments)}"
        launch = Launch(types, constants, tuple(divisible), options)
        if launch not in self.launches:
            self.launches.append(launch)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _is_divisible(value: Any) -> bool:
    """Whether triton knows it for a multiple of 16; storages start where the CUDA allocator's do."""
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


@contextmanager
def recorded(capability: int = 80) -> Iterator[dict[str, Recorder]]:
    """While entered, `LossPath.TRITON` takes tensors of the CPU for those of such a GPU."""
    kernels = {name: Recorder(getattr(triton_info_nce, name)) for name in KERNELS}
    # by its name: the package's attribute of that name is the function
    public = importlib.import_module("lowmem_cft_kernels.info_nce")
    with ExitStack() as stack:
        for name, recorder in kernels.items():
            stack.enter_context(mock.patch.object(triton_info_nce, name, recorder))
        for owner, name, value in (
            (public, "why_not_triton", lambda query_MD: None),
            (tiles, "capability_of", lambda device: capability),
            (Tensor, "is_cuda", property(lambda tensor: True)),
            # the one operation that a CPU has not: a product of 16-bit matrices summed in float32
            (torch, "addmm", lambda *_, out, **__: out.zero_()),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield kernels


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what torch would launch: operations that are neither views nor allocations."""

    _NO_LAUNCH = (
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
        *("promote_types", "_unsafe_view", "detach", "alias"),
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += not (func.is_view or func.overloadpacket.__name__ in self._NO_LAUNCH)
        return func(*args, **(kwargs or {}))
