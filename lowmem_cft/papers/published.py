"""What the papers published: figures with where each was read, and whether that was verified.

A figure is `verified` where it stands in a public source that could be opened. One that rests on a
known bug says so (`Published.bug`), since equality with it is then no success.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

Variant = Literal["base", "fine-tuned", "icl", "transfer"]
"""`base` and `icl` are without training, `icl` with a demonstration; `transfer` is of `base`."""

_Percent = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Figure(_Data):
    """One number: Spearman x 100, or an accuracy in percent."""

    value: _Percent
    source: str
    """The public place where the number was read, in words."""
    verified: bool
    note: str = ""


class ChosenDemonstration(_Data):
    """The demonstration that a paper chose for a model, and what it gained."""

    sentence: str
    word: str
    line: int
    """In the authors' file of 300, from 1."""
    improve: float
    """Points of the mean over the seven sets."""


class Published(_Data):
    """One row of a published table. `sets` has the sets that are known, under our names."""

    paper: str
    model: str
    variant: Variant
    sets: dict[str, Figure]
    mean: Figure | None = None
    note: str = ""
    bug: str = ""
    """The known bug that the figures rest on; empty if there is none."""
    demonstration: ChosenDemonstration | None = None


class _Source(_Data):
    text: str
    verified: bool = True


class _File(_Data):
    sources: dict[str, _Source]
    rows: list[Published]

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        """Give every number its source's text, its own or the row's."""
        sources = values["sources"]
        return {**values, "rows": [_expanded(row, sources) for row in values["rows"]]}

    @model_validator(mode="after")
    def _each_once(self) -> _File:
        keys = [(row.paper, row.model, row.variant) for row in self.rows]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise ValueError(f"rows that stand twice: {sorted(twice)}")
        return self


def _expanded(row: dict[str, Any], sources: dict[str, Any]) -> dict[str, Any]:
    row = dict(row)
    of_row, numbers = row.pop("source"), row.pop("numbers")

    def figure(number: Any) -> dict[str, Any]:
        values = dict(number) if isinstance(number, dict) else {"value": number}
        source = sources[values.pop("source", of_row)]
        return {**values, "source": source["text"], "verified": source.get("verified", True)}

    mean = {"mean": figure(row["mean"])} if "mean" in row else {}
    return {**row, **mean, "sets": {name: figure(number) for name, number in numbers.items()}}


@cache
def _file() -> _File:
    text = (resources.files("lowmem_cft") / "papers" / "published.yaml").read_text(encoding="utf-8")
    return _File.model_validate(yaml.safe_load(text))


def published_rows(paper: str) -> tuple[Published, ...]:
    """All rows of a paper."""
    return tuple(row for row in _file().rows if row.paper == paper)
