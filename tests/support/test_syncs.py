"""What makes the host wait for a GPU is seen, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from syncs import HostWaits

# each gets floats (4, 5), indices (4,) and truth values (4,), on what stands for the GPU
READS: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "item": lambda x, index, mask: x.sum().item(),
    "a truth value": lambda x, index, mask: bool(mask.any()),
    "a list": lambda x, index, mask: index.tolist(),
    "an array": lambda x, index, mask: index.numpy(),
    "equal": lambda x, index, mask: torch.equal(x, x),
    "nonzero": lambda x, index, mask: mask.nonzero(),
    "masked_select": lambda x, index, mask: x.masked_select(mask[:, None]),
    "unique": lambda x, index, mask: index.unique(),
    "unique_consecutive": lambda x, index, mask: index.unique_consecutive(),
    "unique rows": lambda x, index, mask: x.unique(dim=0),
    "bincount": lambda x, index, mask: index.bincount(minlength=9),
    "repeats in a tensor": lambda x, index, mask: x.repeat_interleave(index, dim=0),
    "a mask as index": lambda x, index, mask: x[mask],
    "assignment by a mask": lambda x, index, mask: x.index_put_((mask,), x.new_ones(5)),
    "a value in a tensor": lambda x, index, mask: x.masked_fill_(mask[:, None], x[0, 0]),
}
COPIES: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "to the host": lambda x, index, mask: x.cpu(),
    "to the host, not waited for": lambda x, index, mask: x.to("cpu", non_blocking=True),
    "into the host's": lambda x, index, mask: torch.ones(4, 5).copy_(x),
    "from the host": lambda x, index, mask: torch.ones(4).to(x.device),
    "from the host, not pinned": lambda x, index, mask: torch.ones(4).to(
        x.device, non_blocking=True
    ),
    "pinned, but waited for": lambda x, index, mask: torch.ones(4).pin_memory().to(x.device),
    "into the GPU's": lambda x, index, mask: x.copy_(torch.ones(4, 5)),
    "a new tensor": lambda x, index, mask: torch.tensor([1.0, 2.0], device=x.device),
    "a number": lambda x, index, mask: torch.as_tensor(0.1, device=x.device),
    "more numbers": lambda x, index, mask: x.new_tensor([1.0, 2.0]),
    "a list as index": lambda x, index, mask: x[[0, 1]],
    "the host's index": lambda x, index, mask: x[torch.arange(3)],
    "the host's choice": lambda x, index, mask: torch.where(mask[:, None], x, torch.tensor(1.0)),
}
FREE: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "arithmetic": lambda x, index, mask: (x @ x.T + 0.5).softmax(dim=1).sum() * torch.tensor(2.0),
    "an index": lambda x, index, mask: x[index].index_put_((index,), x, accumulate=True),
    "a choice": lambda x, index, mask: torch.where(mask[:, None], x, 1.0).masked_fill(x > 1, 0.0),
    "a known size": lambda x, index, mask: x.repeat_interleave(index, dim=0, output_size=6),
    "numbers made there": lambda x, index, mask: (
        torch.arange(4, device=x.device),
        torch.full((), 0.1, device=x.device),
    ),
    "the host's own": lambda x, index, mask: torch.tensor([1.0])[[0]].double().sum().item(),
    "slices": lambda x, index, mask: x[1:, None, ..., 2],
    "what is there": lambda x, index, mask: torch.as_tensor(x, device=x.device),
    "another dtype": lambda x, index, mask: x.to(torch.float64).copy_(x),
}


def waits(operation: Callable[[Tensor, Tensor, Tensor], object], device: str) -> list[str]:
    x, index = torch.ones(4, 5, device=device), torch.tensor([0, 2, 3, 1]).to(device)
    with HostWaits(device) as found:
        try:
            operation(x, index, index > 0)
        except (NotImplementedError, RuntimeError, TypeError):  # no value is there to be read
            assert device == "meta"
    return found.found


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("name", READS)
def test_reading_values_is_seen(name: str, device: str) -> None:
    found = waits(READS[name], device)
    assert found
    assert all(f"{__file__}:" in line for line in found), "it does not say where"


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_seen(name: str) -> None:
    assert waits(COPIES[name], "meta")


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("name", FREE)
def test_nothing_else_is(name: str, device: str) -> None:
    if (name, device) != ("the host's own", "cpu"):  # not to be told apart
        assert not waits(FREE[name], device)


def test_a_pinned_copy_is_not_waited_for() -> None:
    with HostWaits() as found:
        pinned = torch.ones(4, 5).pin_memory()
        assert pinned.is_pinned()
        assert not torch.ones(4, 5).is_pinned()
        there = pinned[1:].to("meta", non_blocking=True)
        there.copy_(pinned[1:], non_blocking=True)
        assert there.is_cuda
        assert not pinned.is_cuda
    assert not found.found
    assert not there.is_cuda


def test_what_runs_backward_is_seen_too() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, d_out: Tensor) -> Tensor:
            return d_out * float(d_out.sum())

    x = torch.ones(3, requires_grad=True)
    with HostWaits("cpu") as found:
        Reads.apply(x).sum().backward()  # type: ignore[no-untyped-call]
    assert len(found.found) == 1
