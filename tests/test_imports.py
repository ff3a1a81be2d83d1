"""Every module imports, with whatever versions are installed."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import lowmem_cft
import lowmem_cft_kernels

MODULES = [
    module.name
    for package in (lowmem_cft, lowmem_cft_kernels)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


@pytest.mark.parametrize("name", MODULES)
def test_imports(name: str) -> None:
    importlib.import_module(name)


def test_modules_were_found() -> None:
    assert {"lowmem_cft.training.trainer", "lowmem_cft_kernels.chunked"} <= set(MODULES)
