"""The allocator's settings: what is asked of torch, and when nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowmem_cft import machine

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch is asked for."""
    found: list[str] = []
    # the function has to be there: torch has renamed it before
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine.sys, "platform", "linux")
    return found


def test_blocks_grow_on_cuda(asked: list[str]) -> None:
    machine.grow_cuda_blocks(CPU)
    assert asked == []
    machine.grow_cuda_blocks(CUDA)
    assert asked == ["expandable_segments:True"]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_users_own_settings_stay(
    name: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    machine.grow_cuda_blocks(CUDA)
    assert asked == []


def test_off_linux_nothing_is_asked(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sys, "platform", "win32")
    machine.grow_cuda_blocks(CUDA)
    assert asked == []


def test_torch_takes_the_setting() -> None:
    """torch's own parser, in this process: without a card nothing else happens."""
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    with pytest.raises((RuntimeError, ValueError)):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:Maybe")


def test_versions_are_of_what_is_installed() -> None:
    by_name = machine.library_versions(("no-such-library", "torch"))
    assert by_name.keys() == {"python", "torch"}
    assert by_name["torch"].startswith(torch.__version__.partition("+")[0])


def test_the_processor_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: Another\n")
    monkeypatch.setattr(machine, "Path", lambda _: info)
    assert machine.processor_name() == "Some CPU @ 2 GHz"
    info.write_text("processor : 0\n")
    monkeypatch.setattr(machine.platform, "processor", lambda: "arm")
    assert machine.processor_name() == "arm"
