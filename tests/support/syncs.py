"""Where the host would wait for a GPU, found on machines that have none.

Tensors of the meta device stand for a GPU's: values of theirs cannot be read at all, and copies
from and to the host are seen. Tensors of the CPU can stand for them too, where values are needed;
then only what reads values is seen.
"""

from __future__ import annotations

import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_cft_kernels import surroundings

_TORCH = str(Path(torch.__file__).parent)

_READERS = (Tensor.tolist, Tensor.numpy)
"""They read without an operation that a dispatch mode is told of."""

_READ_VALUES = {"_local_scalar_dense", "is_nonzero", "equal"}
"""They give the host a value."""

_SIZED_BY_VALUES = {
    "nonzero",
    "masked_select",
    "bincount",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
"""The host has to know how large their result is."""

_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}

_COPIES = {"_to_copy", "copy_"}

_MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
"""What they make of numbers, the host makes first."""


class HostWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, lists in `found` what makes the host wait, as "operation at file:line".

    Where tensors of the meta device are read, torch raises as well. `pin_memory` gives a copy that
    counts as pinned; `is_cuda` is true of the stand-ins, and `surroundings.is_gpu` of their device.

    Args:
        device: the type of those that stand for the GPU's: "meta" or "cpu".
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.found: list[str] = []
        self._pinned: list[Tensor] = []
        self._patches = ExitStack()

    def __enter__(self) -> HostWaits:
        is_cuda = property(lambda tensor: tensor.device.type == self.device)
        for name, value in (
            ("pin_memory", lambda tensor: self._pin(tensor)),  # bound to tensors, not to this
            ("is_pinned", lambda tensor: self._is_pinned(tensor)),
            ("is_cuda", is_cuda),
        ):
            self._patches.enter_context(mock.patch.object(Tensor, name, value))
        is_gpu = mock.patch.object(
            surroundings, "is_gpu", lambda device: device.type == self.device
        )
        self._patches.enter_context(is_gpu)
        self._patches.enter_context(_Calls(self))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patches.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._waits(func, args, kwargs):
            self.add(str(func))
        return func(*args, **kwargs)

    def add(self, name: str) -> None:
        """An operation that waits."""
        self.found.append(f"{name} at {_caller()}")

    def _waits(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        name, leaves = func.overloadpacket.__name__, tree_leaves((args, kwargs))  # type: ignore[no-untyped-call]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if name in _COPIES:
            return self._copy_waits(name, args, kwargs)
        if not any(map(self._is_of_device, tensors)):
            return False
        if name in _READ_VALUES or name in _SIZED_BY_VALUES:
            return True
        if name == "repeat_interleave":  # with repeats in a tensor
            return kwargs.get("output_size") is None
        if name in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            return masks or not all(map(self._is_of_device, indices))
        if name in ("masked_fill", "masked_fill_"):  # a value in a tensor is read
            return isinstance(args[2], Tensor) and self._is_of_device(args[2])
        # a number in a tensor of the host is copied first
        return name == "where" and not all(map(self._is_of_device, tensors))

    def _copy_waits(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if name == "copy_":
            source, target = args[1], args[0].device.type
            asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            source, device = args[0], kwargs.get("device")
            target = source.device.type if device is None else device.type
            asynchronous = kwargs.get("non_blocking", False)
        if source.device.type == target or self.device not in (source.device.type, target):
            return False
        if source.device.type == self.device:  # the host wants the values
            return True
        return not (asynchronous and self._is_pinned(source))

    def _is_of_device(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device

    def _pin(self, tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        self._pinned.append(pinned)  # held, so that its address is nobody else's
        return pinned

    def _is_pinned(self, tensor: Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        return any(address == held.untyped_storage().data_ptr() for held in self._pinned)


class _Calls(TorchFunctionMode):
    """Sees what reads and copies below what a dispatch mode is told of."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READERS and args[0].device.type == self.waits.device:
            self.waits.add(func.__name__)
        # on the CPU, what the host makes for itself cannot be told from what it makes for the GPU
        if self.waits.device != "cpu" and self._copies(func, args, kwargs):
            self.waits.add(func.__name__)
        return func(*args, **kwargs)

    def _copies(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        holder = args[0] if args and isinstance(args[0], Tensor) else None
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            lists = any(isinstance(part, list) for part in index)
            return lists and holder is not None and holder.device.type == self.waits.device
        if func not in _MAKERS or (holder is not None and func is not Tensor.new_tensor):
            return False
        device = kwargs.get("device")
        if device is None:
            return holder is not None and holder.device.type == self.waits.device
        return torch.device(device).type == self.waits.device


def _caller() -> str:
    """The innermost line that is neither torch's nor this file's."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_TORCH) and frame.filename != __file__:
            return f"{frame.filename}:{frame.lineno}"
    return "?"
