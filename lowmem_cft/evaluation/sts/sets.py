"""A set's pairs, from a file, a saved data set or the hub, with their size checked.

What was read is told by a checksum or a revision, so that two numbers can be known to be of the
same data.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowmem_cft.data.columns import DataError, UnclearColumns, scored_columns
from lowmem_cft.data.formats import tables
from lowmem_cft.data.rows import ScoredPair, read_scored_pairs
from lowmem_cft.evaluation.clean_up import clean_up
from lowmem_cft.evaluation.sts.protocols import (
    DEMO_PAIRS,
    SETS,
    HubSet,
    Protocol,
    StsSet,
    find_in,
    is_saved,
    sets_in,
)
from lowmem_cft.files import cache_folder, nearest_names, sha256_of, whole_folder

COLUMNS = "::"
"""Between a file and the columns of its sentences and scores: pairs.tsv::first,second,rating, or
numbers where it has no header."""

DIGITS = 12
"""How many digits of a checksum or revision stand beside a number."""


@dataclass(frozen=True)
class LoadedSet:
    """`set_pairs` is the protocol's number of pairs, None where no protocol fixes it."""

    name: str
    pairs: list[ScoredPair]
    set_pairs: int | None
    source: str
    version: str = ""
    """The file's checksum (sha256:...), the hub's revision (revision:...), else the pairs' own
    checksum (pairs:...); 12 digits."""
    own_text: bool = True
    """Whether the text is the protocol's own."""


def data_folder() -> Path | None:
    """`$LOWMEM_CFT_DATA`, if set.

    Raises:
        ValueError: it names no folder.
    """
    given = os.environ.get("LOWMEM_CFT_DATA")
    if not given:
        return None
    if not Path(given).is_dir():
        raise ValueError(f"LOWMEM_CFT_DATA: no such folder: {given}")
    return Path(given)


def pairs_sha256(pairs: list[ScoredPair]) -> str:
    """The checksum of texts and gold scores in their order, wherever they were read from."""
    digest = hashlib.sha256()
    for pair in pairs:
        for part in (pair.sentence1, pair.sentence2, repr(pair.score)):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _read(
    path: Path,
    *,
    columns: list[str] | None = None,
    split: str = "test",
    where: Mapping[str, str] | None = None,
) -> tuple[list[ScoredPair], str]:
    """The pairs and their version."""
    pairs, _ = read_scored_pairs(str(path), columns=columns, split=split, where=where)
    if path.is_file():
        return pairs, f"sha256:{sha256_of(path)[:DIGITS]}"
    return pairs, f"pairs:{pairs_sha256(pairs)[:DIGITS]}"


def _from_hub(hub: HubSet, offline: bool) -> list[ScoredPair]:
    """Read once from the hub at the revision, then from the cache.

    Raises:
        DataError: it is not in the cache, and offline, or the hub cannot be reached or has no such
            revision.
    """
    parts = (hub.path.replace("/", "--"), hub.config or "default", hub.revision[:DIGITS], hub.split)
    folder = cache_folder() / "datasets" / "-".join(parts)
    if not folder.is_dir():
        if offline:
            raise DataError("offline, so the hub was not asked")
        import datasets

        try:
            loaded = datasets.load_dataset(
                hub.path, hub.config, split=hub.split, revision=hub.revision
            )
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().splitlines() or [""]
            raise DataError(f"{type(error).__name__}: {reason[0]}") from error
        with whole_folder(folder) as partial:
            loaded.save_to_disk(str(partial))
    pairs, _ = read_scored_pairs(str(folder))
    return pairs


def _find_and_read(entry: StsSet, folder: Path | None, offline: bool) -> LoadedSet:
    """From the folder if it has the set, else from the hub.

    Raises:
        ValueError: it is in neither; the message says where to get it.
    """
    place = None if folder is None else find_in(entry, folder)
    if place is not None:
        pairs, version = _read(place.path, split=place.split, where=place.where)
        name = place.path.name
        return LoadedSet(entry.name, pairs, entry.num_pairs, name, version, place.own_text)
    looked = "LOWMEM_CFT_DATA names no folder" if folder is None else f"{folder} has not"
    tried = f"{looked} {entry.places}" if folder else f"{looked} (wanted in it: {entry.places})"
    if entry.hub is None:
        hub = "no data set on the hub has it"
    else:
        try:
            pairs = _from_hub(entry.hub, offline)
        except DataError as error:
            hub = f"nor does the hub give it ({error})"
        else:
            version = f"revision:{entry.hub.revision[:DIGITS]}"
            own_text = entry.hub.own_text
            path = entry.hub.path
            return LoadedSet(entry.name, pairs, entry.num_pairs, path, version, own_text)
    raise ValueError(f"eval set {entry.name}: {tried}; {hub}; get it from {entry.origin}")


def check_set_name(name: str, protocol: Protocol | None = None) -> None:
    """Refuse a name that is no set's, no file's and no saved data set's.

    Raises:
        ValueError: it is none; the message has the nearest names.
    """
    if protocol is not None:
        if protocol.find(name) is None:
            known = ", ".join(entry.name for entry in protocol.sets)
            raise ValueError(f"eval set {name!r}: the {protocol.name} protocol has {known}")
        return
    path, columns = _path_and_columns(name)
    if columns is not None and len(columns) != 3:
        raise ValueError(
            f"eval set {name!r}: got {len(columns)} columns behind the file's name, wanted those of "
            f"sentence1, sentence2 and score: {path}{COLUMNS}1,2,3, or their names"
        )
    if name in SETS or name == "demo" or path.is_file() or is_saved(path):
        return
    near = difflib.get_close_matches(name, [*SETS, "demo"], n=1)
    hint = f" (did you mean {near[0]}?)" if near else f" ({nearest_names(path)})"
    raise ValueError(
        f"eval set {name!r}: no such file{hint}, and none of {', '.join(SETS)} or demo"
    )


def _path_and_columns(name: str) -> tuple[Path, list[str] | None]:
    """What a set's name says where it is no set's of a protocol."""
    path, mark, columns = name.rpartition(COLUMNS)
    if not mark or Path(name).expanduser().exists():
        return Path(name).expanduser(), None
    return Path(path).expanduser(), [column.strip() for column in columns.split(",")]


def unclear_columns(name: str) -> UnclearColumns | None:
    """Why the columns of a file of pairs must be named, None where they need not or it is no file.

    Raises:
        ValueError: the file cannot be read.
    """
    path, columns = _path_and_columns(name)
    if columns is None and path.is_file() and name not in (*SETS, "demo"):
        for table in tables(str(path), "test", offline=True):
            try:
                scored_columns(table, None)
            except UnclearColumns as unclear:
                return unclear
    return None


def with_columns(name: str, columns: Sequence[str]) -> str:
    """The set's name with its columns: of the first sentence, the second, the score."""
    return f"{name}{COLUMNS}{','.join(columns)}"


def _by_name(name: str, folder: Path | None, protocol: Protocol | None, offline: bool) -> LoadedSet:
    check_set_name(name, protocol)
    entry = SETS.get(name) if protocol is None else protocol.find(name)
    if entry is not None:
        return _find_and_read(entry, folder, offline)
    if name == "demo":
        pairs, version = _read(DEMO_PAIRS)
        return LoadedSet(name, pairs, None, DEMO_PAIRS.name, version)
    path, columns = _path_and_columns(name)
    try:
        pairs, version = _read(path, columns=columns)
    except UnclearColumns as unclear:
        named = with_columns(name, unclear.columns or ("SENTENCE1", "SENTENCE2", "SCORE"))
        raise ValueError(
            f"eval set {unclear.why}; name those of sentence1, sentence2 and score: {named}"
        ) from None
    return LoadedSet(name, pairs, None, path.name, version)


def load_set(
    name: str,
    folder: Path | None,
    limit: int | None = None,
    *,
    offline: bool = False,
    protocol: Protocol | None = None,
    cleaned_up: bool = False,
) -> LoadedSet:
    """Read a set's pairs, `limit` of them if given (see `sampled`).

    Args:
        name: a set of the protocol; without one also `STSBenchmark-dev`, `demo` for the embedded
            pairs, a file of scored pairs, or a saved data set, with its columns if they must be
            named (see `COLUMNS`).
        folder: the data folder; what it has not is asked for at the hub.
        cleaned_up: apply `clean_up` to every text.

    Raises:
        ValueError: it is not there, a row is wrong, or its size is not the protocol's.
    """
    loaded = _by_name(name, folder, protocol, offline)
    num_read, size = len(loaded.pairs), loaded.set_pairs
    if size is not None and num_read != size:
        raise ValueError(
            f"{loaded.source}: got {num_read:,} pairs, {name} has {size:,}"
            + ("" if protocol is None else f" under the {protocol.name} protocol")
            + "; get it anew, or name the file itself to score what is in it"
        )
    loaded = sampled(loaded, limit)
    pairs = loaded.pairs
    if len({pair.score for pair in pairs}) < 2:
        drawn = "" if len(pairs) == num_read else f" drawn of {num_read}"
        raise ValueError(
            f"eval set {name}: got {len(pairs)} pairs{drawn}, all with the score "
            f"{pairs[0].score:g}, which no similarity can follow; wanted scores that differ"
        )
    if protocol is not None and protocol.name == "senteval":  # it cuts texts into words
        pairs = [
            _with_texts(p, " ".join(p.sentence1.split()), " ".join(p.sentence2.split()))
            for p in pairs
        ]
    if cleaned_up:
        pairs = [_with_texts(p, clean_up(p.sentence1), clean_up(p.sentence2)) for p in pairs]
    return replace(loaded, pairs=pairs)


def sampled(loaded: LoadedSet, limit: int | None, seed: int = 0) -> LoadedSet:
    """`limit` pairs drawn at random, always the same ones, in the set's order.

    Not the first ones: sets are ordered by where their pairs come from.
    """
    if limit is None or limit >= len(loaded.pairs):
        return loaded
    drawn = sorted(random.Random(seed).sample(range(len(loaded.pairs)), limit))
    return replace(loaded, pairs=[loaded.pairs[i] for i in drawn])


def _with_texts(pair: ScoredPair, sentence1: str, sentence2: str) -> ScoredPair:
    return ScoredPair(sentence1, sentence2, pair.score)


def _names(protocol: Protocol | None, names: list[str] | None, folder: Path | None) -> list[str]:
    """The sets to score: those named, else all of the protocol, else all in the folder."""
    if names:
        repeated = sorted(name for name, times in Counter(names).items() if times > 1)
        if repeated:
            raise ValueError(f"eval set {repeated[0]}: named twice; name each set once")
        return names
    if protocol is not None:
        return [entry.name for entry in protocol.sets]
    if folder is None:
        return ["demo"]
    if at_hand := sets_in(folder):
        return at_hand
    raise ValueError(f"LOWMEM_CFT_DATA: {folder} holds none of {', '.join(SETS)}")


def load_sets(
    protocol: Protocol | None,
    names: list[str] | None,
    *,
    offline: bool = False,
    cleaned_up: bool = False,
) -> list[LoadedSet]:
    """The sets named, else every set of the protocol, else those that the data folder holds.

    Raises:
        ValueError: some cannot be read; each is named, with where to get it.
    """
    folder = data_folder()
    listed = _names(protocol, names, folder)
    loaded, wrong = [], []
    for name in listed:
        try:
            loaded.append(
                load_set(name, folder, offline=offline, protocol=protocol, cleaned_up=cleaned_up)
            )
        except ValueError as error:
            wrong.append(str(error))
    if len(wrong) == 1:
        raise ValueError(wrong[0])
    if wrong:
        raise ValueError(
            "\n  ".join([f"{len(wrong)} of {len(listed)} sets cannot be read:", *wrong])
        )
    return loaded
