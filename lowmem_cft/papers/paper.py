"""A paper as an object: what was published, which stages repeat it, what this run does otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lowmem_cft.evaluation.sts.protocols import ProtocolName
from lowmem_cft.papers import names
from lowmem_cft.papers.published import Published, Variant
from lowmem_cft.papers.results import Record
from lowmem_cft.recipe.load import preset_names
from lowmem_cft.recipe.schema import Recipe


class Share(Record):
    """How much of the published run is done; pairs of numbers are ours and the published.

    `transfer_rows_per_split` is None where all rows count, `ablation_steps` where the paper has no
    ablations. It was cut to fit into `hours` with `budget` of memory, where these are given.
    """

    training_steps: tuple[int, int]
    ablation_steps: tuple[int, int] | None
    transfer_rows_per_split: int | None
    icl_pairs: tuple[int, int]
    hours: float | None = None
    budget: str | None = None

    def describe(self) -> str:
        """One sentence."""
        ours, published = self.training_steps
        said = f"{ours:,} of the paper's {published:,} training steps ({ours / published:.1%})"
        if self.ablation_steps is not None:
            said += "; ablations of {:,} of {:,} steps".format(*self.ablation_steps)
        return said

    @property
    def limits(self) -> str:
        """What was asked for."""
        hours = [] if self.hours is None else [f"{self.hours:g} h"]
        budget = [] if self.budget is None else [f"{self.budget} of memory"]
        return " and ".join([*hours, *budget]) or "the whole run, without limits"


@dataclass(frozen=True)
class PaperFacts:
    """What holds for all of a paper's figures; `models` are names by key."""

    title: str
    arxiv: str
    protocol: ProtocolName
    models: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingData:
    """The file that a paper trained on, where it is, and its number of rows."""

    name: str
    url: str
    rows: int


@dataclass(frozen=True)
class Ablation:
    """One changed value of the recipe.

    Args:
        name: the stage that trains it; `evaluate-NAME` scores it.
        what: the change in words.
        key: the recipe's key that is changed.
        value: its value as the command line takes it. None stands for the recipe as it is, which
            is trained only where no ablation listed before this one is the same.
        title: the heading of the key's section in the report.
    """

    name: str
    what: str
    key: str
    value: str | None
    title: str

    @property
    def assignments(self) -> list[str]:
        return [] if self.value is None else [f"{self.key}={self.value}"]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper whose run can be repeated.

    Args:
        name: the paper's name in commands and files.
        clean_up: whether texts are cleaned up before they are embedded.
        recipes: names or files of recipes, by model.
        stages: names of the paper's stages in their order, without its ablations, which come last.
        beyond: names of stages that the paper does not have, but that its models can do.
        ablations: single changes; one of them is the baseline of the others.
        ablation_steps: optimizer steps of each ablation.
        search_recipe: the recipe whose template demonstrations are put before; None for the run's.
        published_length: what the steps of training are a share of, in the report's words.
        departures: gives a sentence for each thing that a run does otherwise than the paper.
        rows: the published figures.
    """

    name: str
    facts: PaperFacts
    clean_up: bool
    data: TrainingData
    recipes: Mapping[str, str]
    stages: tuple[str, ...]
    beyond: tuple[str, ...] = ()
    ablations: tuple[Ablation, ...] = ()
    ablation_steps: int = 0
    search_recipe: str | None = None
    published_length: str = "the published"
    departures: Callable[[Recipe, Share], list[str]] = lambda recipe, share: []
    rows: tuple[Published, ...] = ()

    def __post_init__(self) -> None:
        assert bool(self.ablations) == bool(self.ablation_steps), "ablations have a length"

    def ablations_from(self, baseline: str | None) -> list[str]:
        """Names of the ablations, the baseline first; it is the first one if none is given."""
        listed = [ablation.name for ablation in self.ablations if ablation.value is not None]
        return list(dict.fromkeys([baseline or listed[0], *listed])) if listed else []

    @property
    def ablations_by_key(self) -> list[tuple[str, str, list[Ablation]]]:
        """Keys of the recipe with their titles and ablations, for the report."""
        titles = {ablation.key: ablation.title for ablation in self.ablations}
        return [
            (key, title, [ablation for ablation in self.ablations if ablation.key == key])
            for key, title in titles.items()
        ]

    def own_stages(self, baseline: str | None) -> list[str]:
        """Names of the paper's stages in the order of the report."""
        ablations = self.ablations_from(baseline)
        return [
            *self.stages,
            *(stage for name in ablations for stage in (name, names.evaluation_of(name))),
        ]

    def published(self, model: str, variant: Variant) -> Published | None:
        """The published row of a model and variant, if it is known."""
        same = (row for row in self.rows if (row.model, row.variant) == (model, variant))
        return next(same, None)


def preset_recipes(paper: str) -> dict[str, str]:
    """The presets that are named PAPER-MODEL, by model."""
    prefix = f"{paper}-"
    return {name.removeprefix(prefix): name for name in preset_names() if name.startswith(prefix)}


def num_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps over so many rows, the last and smaller batch of an epoch counted."""
    train = recipe.train
    if train.steps is not None:
        return train.steps
    return math.ceil((train.epochs or 1.0) * rows / train.logical_batch)
