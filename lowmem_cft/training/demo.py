"""The demo: the embedded model on the best data at hand, with a table and one JSON line.

Data, in this order: the folder `$LOWMEM_CFT_DATA` names, the hub if it answers within seconds,
the small set shipped with the package.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_cft.evaluation.sts.protocols import sets_in
from lowmem_cft.evaluation.sts.sets import data_folder
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.training.pipeline import run_recipe
from lowmem_cft.training.records import Metrics
from lowmem_cft.training.trainer import Observer

_LOCAL_TRIPLETS = "nli/nli_triplets.tsv.gz"
_EVAL_SET = "STSBenchmark-dev"
_HUB_TRIPLETS = "sentence-transformers/all-nli:triplet"
_HUB_SECONDS = 4.0


def _hub_answers() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = f"{constants.ENDPOINT}/api/datasets/{_HUB_TRIPLETS.partition(':')[0]}"
    try:
        with urllib.request.urlopen(address, timeout=_HUB_SECONDS):
            return True
    except OSError:
        return False


def choose_data(offline: bool) -> tuple[str, list[str]]:
    """The data to take: their name for the report, and the overrides that name them in the recipe."""
    folder = data_folder()
    has_set = folder is not None and _EVAL_SET in sets_in(folder)
    if folder is not None and has_set and (folder / _LOCAL_TRIPLETS).is_file():
        source = {"path": str(folder / _LOCAL_TRIPLETS), "where": {"in_eval": "0"}}
        return f"NLI triplets and {_EVAL_SET} in {folder}", _overrides(source, _EVAL_SET)
    if not offline and (folder is None or has_set) and _hub_answers():
        hub = {"path": _HUB_TRIPLETS, "limit": 20000}
        return "NLI triplets and STS-B dev from the hub", _overrides(hub, _EVAL_SET)
    return "the embedded triplets and pairs", []


def _overrides(source: dict[str, Any], eval_set: str) -> list[str]:
    import yaml

    listed = yaml.safe_dump([source], default_flow_style=True, width=10**6).strip()
    return [f"data.sources={listed}", f"eval.sets=[{eval_set!r}]"]


@dataclass(frozen=True)
class DemoSummary:
    """The demo in one JSON object: Spearman correlations, the time of it all, and what it used."""

    before: float
    after: float
    seconds: float
    peak_bytes: int
    data: str
    model: str


def run_demo(
    observer: Observer, *, offline: bool, overrides: Sequence[str] = ()
) -> tuple[Metrics, DemoSummary]:
    """Run the demo recipe from its first step, replacing the last demo's run."""
    started = time.perf_counter()
    name, data = choose_data(offline)
    observer.say(f"data: {name}")
    recipe = load_recipe("demo", [*data, *overrides])
    _, metrics = run_recipe(recipe, observer, overwrite=True, offline=offline)
    return metrics, DemoSummary(
        before=metrics.before[0].spearman,
        after=metrics.after[0].spearman,
        seconds=round(time.perf_counter() - started, 1),
        peak_bytes=metrics.peak_bytes,
        data=name,
        model=recipe.model.id,
    )
