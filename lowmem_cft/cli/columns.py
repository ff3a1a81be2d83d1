"""Which columns of a file of scored pairs are the sentences and the score, asked at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import typer

from lowmem_cft.evaluation.sts.sets import unclear_columns, with_columns


def with_columns_named(names: Sequence[str], option: Callable[[int, str], str]) -> list[str]:
    """The sets, those whose columns are unclear with what was answered.

    Args:
        option: of a set's place and its name with columns: what to type to name them.

    Raises:
        ValueError: they are unclear, and nobody is asked or the proposal was not taken.
    """
    return [_with_columns(name, partial(option, i)) for i, name in enumerate(names)]


def _with_columns(name: str, option: Callable[[str], str]) -> str:
    unclear = unclear_columns(name)
    if unclear is None:
        return name
    roles = ("sentence1", "sentence2", "score")
    likely = unclear.columns
    if likely is not None and sys.stdin.isatty() and sys.stderr.isatty():
        typer.echo(unclear.why, err=True)
        proposal = ", ".join(f"{role} {col}" for role, col in zip(roles, likely, strict=True))
        if typer.confirm(f"columns: {proposal}?", default=True, err=True):
            return with_columns(name, likely)
        likely = None
    named = with_columns(name, likely or [role.upper() for role in roles])
    raise ValueError(
        f"{unclear.why}; name the columns of {', '.join(roles)}, in this order: {option(named)}"
    )
