"""Semantic textual similarity: the protocols, the sets each has, and where their pairs lie.

A protocol fixes which sets there are, the text and the number of pairs of each, and what is
averaged. Two are known:

- mteb: nine sets under the revisions that mteb pins; SICK-R is all splits, 9,927 pairs.
- senteval: the seven sets of SentEval's "all" setting (one correlation over a set's pairs, its
  subsets concatenated); SICK-R is the test split, 4,927 pairs.

SentEval's data script runs the Moses tokenizer over every set and lower-cases all but SICK
(data/downstream/get_transfer_data.bash); mteb took STS12 to STS16 over in that form. A file with
another text than the protocol's is read where nothing better is there, and marked in the scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

DEMO_PAIRS = Path(str(resources.files("lowmem_cft") / "data" / "embedded" / "sts_pairs.tsv"))

ProtocolName = Literal["mteb", "senteval"]


@dataclass(frozen=True)
class HubSet:
    """A data set on the hub; `own_text` says whether its text is the protocol's."""

    path: str
    revision: str
    split: str = "test"
    config: str | None = None
    own_text: bool = True


@dataclass(frozen=True)
class StsSet:
    """A set of a protocol, and the places in a data folder that may hold it.

    `files` have the protocol's text, `originals` the text as it was before the protocol's
    preparation; the first found counts. `saved` is a folder that `save_to_disk` wrote from the
    data set on the hub.
    """

    name: str
    num_pairs: int
    files: tuple[str, ...]
    originals: tuple[str, ...]
    hub: HubSet | None
    saved: str | None
    where: Mapping[str, str] | None = None
    """Which rows of a file belong to the set; all if absent."""
    get_it: str = ""
    """Where to get it, if not from the hub."""

    @property
    def places(self) -> str:
        """Where it is looked for, in order."""
        saved = () if self.saved is None else (f"{self.saved}/ (saved data set)",)
        return ", ".join((*self.files, *saved, *self.originals))

    @property
    def origin(self) -> str:
        """Where a user gets it."""
        if self.hub is None:
            return self.get_it
        return f"https://huggingface.co/datasets/{self.hub.path} (revision {self.hub.revision[:7]})"


@dataclass(frozen=True)
class Protocol:
    name: ProtocolName
    scored: str
    """What a number is, in words."""
    sets: tuple[StsSet, ...]

    def find(self, name: str) -> StsSet | None:
        return next((entry for entry in self.sets if entry.name == name), None)


@dataclass(frozen=True)
class Place:
    """Files that hold a set: what to read, and whether its text is the protocol's."""

    path: Path
    own_text: bool
    where: Mapping[str, str] | None = None
    split: str = "test"


# Revisions: mteb 2.26's tasks; they were the same in 1.7, but for STS17's, which then was af5e6fb.
_HUB = {
    "STS12": HubSet("mteb/sts12-sts", "a0d554a64d88156834ff5ae9920b964011b16384"),
    "STS13": HubSet("mteb/sts13-sts", "7e90230a92c190f1bf69ae9002b8cea547a64cca"),
    "STS14": HubSet("mteb/sts14-sts", "6031580fec1f6af667f0bd2da0a551cf4f0b2375"),
    "STS15": HubSet("mteb/sts15-sts", "ae752c7c21bf194d8b67fd573edf7ae58183cbe3"),
    "STS16": HubSet("mteb/sts16-sts", "4d8694f8f0e0100860b497b999b3dbed754a0513"),
    "STS17": HubSet(
        "mteb/sts17-crosslingual-sts", "faeb762787bd10488a50c8b5be4a3b82e411949c", config="en-en"
    ),
    "STSBenchmark": HubSet("mteb/stsbenchmark-sts", "b0fddb56ed78048fa8b90373c8a3cfc37b684831"),
    "SICK-R": HubSet("mteb/sickr-sts", "20a6d6f312dd54037fe07a32d58e5e168867909d"),
    "BIOSSES": HubSet("mteb/biosses-sts", "d3fb88f8f02e40887cd149695127462bbcf29b4a"),
}


def _semeval(name: str, num_pairs: int) -> StsSet:
    """STS12 to STS16: tokenised and lower-cased in both protocols. STS13 is without SMT."""
    return StsSet(
        name, num_pairs, (f"{name}/{name}.mteb.tsv",), (f"{name}/{name}.tsv",), _HUB[name], name
    )


_SEMEVAL = tuple(
    _semeval(name, num_pairs)
    for name, num_pairs in (
        ("STS12", 3108),
        ("STS13", 1500),
        ("STS14", 3750),
        ("STS15", 3000),
        ("STS16", 1186),
    )
)


def _benchmark(split: str, hub_split: str, num_pairs: int) -> StsSet:
    name = f"STSBenchmark-{split}"
    files = tuple(f"STSBenchmark/{name}{text}.tsv" for text in (".mteb", ""))
    benchmark = _HUB["STSBenchmark"]
    hub = HubSet(benchmark.path, benchmark.revision, hub_split)
    return StsSet(name, num_pairs, files, (), hub, "STSBenchmark")


_BENCHMARK_TEST = _benchmark("test", "test", 1379)
_BENCHMARK_DEV = _benchmark("dev", "validation", 1500)

SCORED = "cosine Spearman over all pairs of the set"
"""What a score is, under any protocol and under none."""

_MTEB = Protocol(
    "mteb",
    f"{SCORED} (mteb)",
    (
        *_SEMEVAL,
        StsSet("STS17", 250, ("STS17/STS17-en-en.tsv",), (), _HUB["STS17"], "STS17"),
        _BENCHMARK_TEST,
        StsSet(
            "BIOSSES",
            100,
            ("BIOSSES/BIOSSES.mteb.tsv",),
            ("BIOSSES/BIOSSES.tsv",),
            _HUB["BIOSSES"],
            "BIOSSES",
        ),
        StsSet(
            "SICK-R",
            9927,
            ("SICK-R/SICK-R.mteb.tsv", "SICK-R/SICK-R.tsv"),
            (),
            _HUB["SICK-R"],
            "SICK-R",
        ),
    ),
)

_SENTEVAL = Protocol(
    "senteval",
    f'{SCORED} (SentEval, "all")',
    (
        *_SEMEVAL,
        StsSet(
            "STSBenchmark-test",
            1379,
            ("STSBenchmark/STSBenchmark-test.senteval.tsv",),
            _BENCHMARK_TEST.files,
            HubSet(_HUB["STSBenchmark"].path, _HUB["STSBenchmark"].revision, own_text=False),
            None,
        ),
        StsSet(
            "SICK-R",
            4927,
            ("SICK-R/SICK-R-test.senteval.tsv",),
            ("SICK-R/SICK-full.tsv", "SICK-R/SICK-R.tsv"),
            None,
            None,
            where={"subset": "test"},
            get_it="https://zenodo.org/records/2787612 (SICK, its test split marked in `subset`)",
        ),
    ),
)

PROTOCOLS: dict[ProtocolName, Protocol] = {"mteb": _MTEB, "senteval": _SENTEVAL}

SETS = {entry.name: entry for entry in (*_MTEB.sets, _BENCHMARK_DEV)}
"""Sets that may be named on their own: mteb's, and STSBenchmark-dev for choosing models."""


def protocol_named(name: str) -> Protocol:
    """Raises ValueError where there is none of that name."""
    for known, protocol in PROTOCOLS.items():
        if name == known:
            return protocol
    raise ValueError(f"`protocol`: got {name!r}, wanted one of {', '.join(PROTOCOLS)}")


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))


def find_in(entry: StsSet, folder: Path) -> Place | None:
    """Where the folder has the set, if it does: the protocol's text before the original."""
    for file in entry.files:
        if (folder / file).is_file():
            return Place(folder / file, True)
    if entry.saved is not None and is_saved(folder / entry.saved):
        split = "test" if entry.hub is None else entry.hub.split
        return Place(folder / entry.saved, True, split=split)
    for file in entry.originals:
        if (folder / file).is_file():
            return Place(folder / file, False, entry.where)
    return None


def sets_in(folder: Path) -> list[str]:
    """Names of the sets that the folder holds."""
    return [name for name, entry in SETS.items() if find_in(entry, folder) is not None]
