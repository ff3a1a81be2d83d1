"""Which column plays which role: by the names given, by their usual names, or by their order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_POSITIVE = r"positives?|pos|positive_passages"
_NEGATIVE = r"negatives?(_\d+)?|neg(_\d+)?|negative_passages|hard_neg(_\d+)?"
_CONVENTIONS = (
    ("anchor", _POSITIVE, _NEGATIVE),
    ("query", _POSITIVE, _NEGATIVE),
    ("sent0", "sent1", _NEGATIVE),
    ("messages", "positive_messages", "negative_messages"),
)
_PAIRS = (("question", "answer"), ("query", "response"), ("premise", "hypothesis"))
# What a name says about its place, to keep "negative, positive" from being taken in that order.
_PLACES = (
    "anchor|query|question|premise",
    f"{_POSITIVE}|answer|response|hypothesis",
    _NEGATIVE,
)
_CONVERSATIONS = ("messages", "conversations")
_SENTENCES = (("sentence1", "sentence2"), ("text1", "text2"), ("s1", "s2"))
_SCORES = ("score", "similarity_score", "label")
_LABEL_WORDS = {"label", "labels", "class", "score", "scores", "similarity", "rating"}
_ID_WORDS = {"id", "ids", "idx", "index", "guid", "uuid", "source", "split", "subset", "url"}
_NAME_TRAINING = (
    "name those to use, in the order anchor, positive, negative..., with `columns: [...]`"
)
_NAME_SCORED = "name those of sentence1, sentence2 and score with `columns: [...]`"


_MOST_WORDS = 3
"""Words of a name of a column; what has more is a text."""


class DataError(ValueError):
    """The user's data is wrong; the message says where, what was wanted and the way out."""


class UnclearColumns(DataError):
    """Nobody can tell the columns' roles; `why` is the message without the way out.

    `columns` are those that they probably are, in the order of their roles, None if that is unclear.
    """

    def __init__(self, why: str, way_out: str, columns: Sequence[str] | None = None) -> None:
        super().__init__(f"{why}; {way_out}")
        self.why, self.columns = why, columns


@dataclass(frozen=True, kw_only=True)
class Header:
    """The columns of one table, and which hold text, which numbers; `name` is for messages.

    Without a header columns are called 1, 2, ...; `first` then has the first line's cells.
    """

    name: str
    columns: list[str]
    text_columns: frozenset[str]
    number_columns: frozenset[str]
    first: Sequence[str] | None = None


def training_columns(
    table: Header, columns: Sequence[str] | None, where: Iterable[str]
) -> list[str]:
    """The columns of the anchor, the positive and any negatives; those of `where` are not text.

    Raises:
        DataError: `columns` does not fit the table, or without it the roles are unclear.
    """
    if columns is not None:
        return _named(table, columns, "anchor, positive, negative...", 2)
    folded = _folded(table, _NAME_TRAINING)
    if table.first is not None:
        raise _unclear(table, "no names")
    for anchor, positive, negative in _CONVENTIONS:
        positives = [name for low, name in folded.items() if re.fullmatch(positive, low)]
        if anchor in folded and len(positives) > 1:
            raise _unclear(table, f"several could be the positive: {positives}")
        if anchor in folded and positives:
            negatives = [low for low in folded if re.fullmatch(negative, low)]
            negatives.sort(key=lambda low: int(re.sub(r"\D", "", low) or 0))
            return [folded[anchor], *positives, *(folded[low] for low in negatives)]
    others = [name for name in table.columns if name not in where]
    if any(set(pair) <= folded.keys() for pair in _SENTENCES) and folded.keys() & set(_SCORES):
        raise _unclear(
            table,
            "these are scored pairs, not all of which are positive ones: they are for `eval.sets`, "
            "or with `where` for training",
        )
    for name in (folded[low] for low in _CONVERSATIONS if low in folded):
        _no_labels(table, others)
        return [name, name]  # whose question is the anchor, and whose answer the positive
    return _pair(table, folded, others) or _in_order(table, others)


def _pair(table: Header, folded: dict[str, str], others: list[str]) -> list[str]:
    """Premise and hypothesis and the like, if no other column could change what they mean."""
    for pair in _PAIRS:
        if not all(low in folded for low in pair):
            continue
        names = [folded[low] for low in pair]
        rest = [name for name in others if name not in names]
        _no_labels(table, rest)
        if all(_words(name) & _ID_WORDS for name in rest):
            return names
    return []


def _no_labels(table: Header, names: Iterable[str]) -> None:
    if labels := [name for name in names if _words(name) & _LABEL_WORDS]:
        raise _unclear(
            table,
            f"the label column {labels[0]!r} may mean that not every pair is a positive one; "
            f"keep the positive ones with `where: {{{labels[0]}: ...}}`",
        )


def _in_order(table: Header, names: list[str]) -> list[str]:
    if len(names) == 1 and names[0] in table.text_columns:
        raise DataError(
            f"{table.name}: got one column of texts, {names[0]!r}, wanted an anchor and a positive; "
            f"`columns: [{names[0]}, {names[0]}]` makes each text its own positive, which dropout "
            "tells from it"
        )
    if len(names) < 2 or not table.text_columns.issuperset(names):
        raise _unclear(table, "no known names, and not two or more columns which all hold text")
    if table.first is None and any(len(name.split()) > _MOST_WORDS for name in names):
        raise DataError(
            f"{table.name}: its first line looks like a row, not like names of columns: {names}; if "
            f"it is one, set `columns: {list(range(1, len(names) + 1))}`, else give those names there"
        )
    for i, name in enumerate(names):
        if not name or _words(name) & (_LABEL_WORDS | _ID_WORDS):
            raise _unclear(table, f"no known names, and {name!r} does not look like a text column")
        places = [p for p, names_ in enumerate(_PLACES) if re.fullmatch(names_, name.lower())]
        if places and min(i, 2) not in places:
            raise _unclear(table, f"no known set of names, and {name!r} is out of order")
    return names


def scored_columns(table: Header, columns: Sequence[str] | None) -> list[str]:
    """The columns of the two sentences and the score; errors as in `training_columns`."""
    if columns is not None:
        return _named(table, columns, "sentence1, sentence2, score", 3, most=3)
    folded = _folded(table, _NAME_SCORED)
    scores = [folded[low] for low in _SCORES if low in folded]
    for pair in _SENTENCES:
        if scores and all(low in folded for low in pair):
            return [folded[pair[0]], folded[pair[1]], scores[0]]
    texts = [name for name in table.columns if name in table.text_columns]
    numbers = [name for name in table.columns if name in table.number_columns]
    if len(table.columns) < 3 or not numbers:
        raise DataError(
            f"{table.name}: got the columns {table.columns}"
            + ("" if numbers else ", of which none holds numbers alone")
            + ", wanted two sentences and their score; rows without one can only be trained on, as "
            "one of `data.sources`"
        )
    likely = [*texts, numbers[-1]] if len(texts) == 2 else None
    raise _unclear(table, "no known names", _NAME_SCORED, likely)


def is_usual_name(name: str) -> bool:
    """Whether columns with a known role are called so."""
    low = name.lower()
    pairs = {known for pair in (*_PAIRS, *_SENTENCES) for known in pair}
    words = _words(name) & (_LABEL_WORDS | _ID_WORDS)
    return low in pairs or bool(words) or any(re.fullmatch(p, low) for p in (*_PLACES, r"sent\d"))


def _named(
    table: Header, columns: Sequence[str], order: str, least: int, most: int | None = None
) -> list[str]:
    if isinstance(columns, str) or not least <= len(columns) <= (most or len(columns)):
        raise DataError(f"{table.name}: columns must be a list of {order}, got {columns!r}")
    require(table, columns, "columns")
    # One text as its own positive is a known method (dropout alone makes the two views differ).
    repeated = [name for name, n in Counter(columns).items() if n > 1]
    if repeated and (most or set(repeated) & set(columns[2:])):
        raise DataError(f"{table.name}, column {repeated[0]!r}: named twice in columns={columns}")
    return list(columns)


def require(table: Header, names: Iterable[str], option: str) -> None:
    """Raise a DataError for a name that is no column of the table; `option` gave the names."""
    for name in names:
        if name not in table.columns:
            raise DataError(
                f"{table.name}: no column {name!r}, which `{option}` names; "
                f"its columns are {table.columns}"
            )


def _folded(table: Header, way_out: str) -> dict[str, str]:
    folded = {name.lower(): name for name in table.columns}
    if len(folded) < len(table.columns):
        raise _unclear(table, "some names differ only in upper and lower case", way_out)
    return folded


def _words(name: str) -> set[str]:
    """The words of a snake_case or camelCase name."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}


def _unclear(
    table: Header, why: str, way_out: str = _NAME_TRAINING, likely: Sequence[str] | None = None
) -> UnclearColumns:
    what = f"cannot tell which columns to use: {why}; its columns are {table.columns}"
    if table.first is not None:
        what = f"its first line is data, no header: {list(table.first)}"
        way_out += ", by number"
    return UnclearColumns(f"{table.name}: {what}", way_out, likely)
