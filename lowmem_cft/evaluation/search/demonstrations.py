"""Demonstrations for in-context learning: a text with the one word that stands for it, put before
the text to be embedded.

Format: that of PromptEOL (arXiv 2307.16645), as its code has it: the template with the
demonstration's text in it, the word, the closing quote, a full stop, and with no space the template.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lowmem_cft.data.columns import DataError
from lowmem_cft.data.formats import BadRow, Table, tables
from lowmem_cft.recipe.schema import TEXT_SLOT

PROMPTEOL = 'This sentence : "{text}" means in one word:"'
SHIPPED = Path(str(resources.files("lowmem_cft") / "evaluation" / "search" / "demonstrations.tsv"))

_CLOSING = {'"': '"', "'": "'", "“": "”", "«": "»"}
_TEXT_COLUMNS = ("sentence", "definition", "text")


@dataclass(frozen=True)
class Demonstration:
    """A sentence or a definition, and its word."""

    sentence: str
    word: str

    def before(self, template: str) -> str:
        """The template with the demonstration before it; it keeps its one slot for the text."""
        closing = _CLOSING.get(template[-1:], "")
        return f"{template.replace(TEXT_SLOT, self.sentence)}{self.word}{closing}.{template}"


def check_template(template: str) -> None:
    """Raise ValueError where a template has not exactly one slot."""
    if template.count(TEXT_SLOT) != 1:
        raise ValueError(f"`template`: got {template!r}, wanted {TEXT_SLOT} in it exactly once")


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Read a JSONL, CSV, TSV or Parquet file with columns sentence (or definition, or text) and word.

    Raises:
        DataError: there is no such file, a row is unusable or stands twice, or there is none.
    """
    if not path.is_file():
        raise DataError(f"`demonstrations`: no such file: {path}")
    line_of: dict[Demonstration, int] = {}
    for table in tables(str(path), "train", offline=True):
        for number, cells in table.rows(_columns(table)):
            where = f"{path}, {table.unit} {number}"
            if isinstance(cells, BadRow):
                raise DataError(f"{where}: {cells}; fix it")
            demonstration = Demonstration(*(_part(cell, where) for cell in cells))
            if len(demonstration.word.split()) > 1:
                raise DataError(f"{where}: got {demonstration.word!r}, wanted one word")
            if demonstration in line_of:
                first = f"{table.unit} {line_of[demonstration]}"
                raise DataError(f"{where}: the same as {first}; remove one")
            line_of[demonstration] = number
    if not line_of:
        raise DataError(f"{path}: no demonstrations; write a line of sentence and word")
    return list(line_of)


def _columns(table: Table) -> tuple[str, str]:
    """The names of the text's column and the word's."""
    texts = [name for name in table.columns if name in _TEXT_COLUMNS]
    if len(texts) != 1 or "word" not in table.columns:
        raise DataError(
            f"{table.name}: its columns are {table.columns}, wanted word and one of "
            f"{', '.join(_TEXT_COLUMNS)}"
        )
    return texts[0], "word"


def _part(cell: Any, where: str) -> str:
    if not isinstance(cell, str) or not cell.strip():
        raise DataError(f"{where}: got {cell!r}, wanted a text and a word")
    if set(cell) & set("{}\n\r"):
        raise DataError(f"{where}: got {cell!r}; braces and line breaks cannot stand in a template")
    return cell.strip()
