"""What stands in the place of other libraries' attributes, and the way back.

Layers of transformers and peft offer no hook for what a chunked step needs of them, so some of
their attributes are replaced. Every replacement goes through a `Patches`, which knows what stood
there before it.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

_RECORD = "_lowmem_cft_patches"


@dataclass(frozen=True)
class _Patch:
    """One replaced attribute; without an `original` the attribute came from the owner's class."""

    owner: Any
    name: str
    replacement: Any
    original: tuple[Any, ...]

    def apply(self) -> None:
        self._put(self.replacement)

    def undo(self) -> None:
        if self.original:
            self._put(*self.original)
        else:
            del _attributes(self.owner)[self.name]

    def _put(self, value: Any) -> None:
        attributes = _attributes(self.owner)
        standing = attributes.get(self.name)
        if isinstance(value, nn.Module) and isinstance(standing, nn.Module):
            value.train(standing.training)  # it heard of no change of mode while it was out
        attributes[self.name] = value


def _attributes(owner: Any) -> MutableMapping[str, Any]:
    """What is an object's own, not its class's; of a ModuleDict its modules."""
    return owner._modules if isinstance(owner, nn.ModuleDict) else vars(owner)


class Patches:
    """Replaced attributes. `undo`, or leaving a `with` block, puts back what stood there."""

    def __init__(self) -> None:
        self._patches: list[_Patch] = []

    def __len__(self) -> int:
        return len(self._patches)

    def __enter__(self) -> Patches:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def install(self, owner: Any, name: str, replacement: Any) -> None:
        """Replace an attribute of an object, or a module in a ModuleDict."""
        attributes = _attributes(owner)
        original = (attributes[name],) if name in attributes else ()
        patch = _Patch(owner, name, replacement, original)
        patch.apply()
        self._patches.append(patch)

    def undo(self, name: str | None = None) -> None:
        """Put the originals back, for good.

        Args:
            name: only those of attributes of this name, as `forward`.
        """
        for patch in reversed(self._named(name)):
            patch.undo()
            self._patches.remove(patch)

    @contextmanager
    def lifted(self, name: str | None = None) -> Iterator[None]:
        """Put the originals back for the length of a block; `name` as in `undo`."""
        patches = self._named(name)
        for patch in reversed(patches):
            patch.undo()
        try:
            yield
        finally:
            for patch in patches:
                patch.apply()

    def _named(self, name: str | None) -> list[_Patch]:
        return [patch for patch in self._patches if name in (None, patch.name)]


def patched_layers(model: Any) -> Patches:
    """The patches in the layers of a model, through which all of ours are installed.

    `patched_layers(model).undo()` leaves the layers as transformers and peft made them, and
    `.lifted("forward")` takes our training forwards out for a while.
    """
    # Kept in the model: a table of all models would keep alive those that its patches refer to.
    patches: Patches = vars(model).setdefault(_RECORD, Patches())
    return patches
