"""What may be asked for: a paper, a model, and how much of the run is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmem_cft.evaluation.sts.protocols import PROTOCOLS, Protocol
from lowmem_cft.papers import names
from lowmem_cft.papers.cft import CFT
from lowmem_cft.papers.paper import Paper, Share, num_steps
from lowmem_cft.papers.prompteol import PROMPTEOL
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.recipe.schema import Recipe

PAPERS = {paper.name: paper for paper in (CFT, PROMPTEOL)}
"""The papers whose runs can be repeated; a new one is put here."""


def find_paper(name: str) -> Paper:
    """The paper of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in PAPERS:
        raise ValueError(f"paper: got {name!r}, wanted one of {', '.join(PAPERS)}")
    return PAPERS[name]


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Raises:
        ValueError: no such paper or model, or hours that are none.
    """

    paper: str
    model: str
    hours: float | None = None
    budget: str | None = None
    overrides: tuple[str, ...] = ()
    transfer_rows: int | None = None
    icl_pairs: int | None = None
    demonstrations: str | None = None

    def __post_init__(self) -> None:
        recipes = find_paper(self.paper).recipes
        if self.model not in recipes:
            raise ValueError(f"`model`: got {self.model!r}; {self.paper} has {', '.join(recipes)}")
        if self.hours is not None and not self.hours > 0:
            raise ValueError(f"`hours`: got {self.hours:g}, wanted more than 0")

    @property
    def of_paper(self) -> Paper:
        return find_paper(self.paper)

    @property
    def recipe_name(self) -> str:
        return self.of_paper.recipes[self.model]

    @property
    def protocol(self) -> Protocol:
        """The paper's protocol of the STS sets."""
        return PROTOCOLS[self.of_paper.facts.protocol]

    @property
    def published_steps(self) -> int:
        """Optimizer steps of the paper's recipe over its data, whatever the user set."""
        return num_steps(load_recipe(self.recipe_name), self.of_paper.data.rows)

    @property
    def whole_steps(self) -> int:
        """Optimizer steps of the uncut run as the user set it."""
        return num_steps(self.recipe(), self.of_paper.data.rows)

    def recipe(self, assignments: Sequence[str] = ()) -> Recipe:
        """The paper's at full size, with what the user set and with more put over it."""
        budget = [] if self.budget is None else [f"memory.limit={self.budget}"]
        return load_recipe(self.recipe_name, [*self.overrides, *budget, *assignments])


def departures(request: Request, share: Share, selected: Sequence[str]) -> list[str]:
    """Where a run is not the paper's, a sentence each.

    Args:
        selected: names of the stages that are done.
    """
    paper, recipe = request.of_paper, request.recipe()
    sentences = []
    if request.model not in paper.facts.models:
        sentences.append("The model is not one of the paper's: no published figure belongs to it.")
    ours, published = share.training_steps
    if ours != published:
        sentences.append(
            f"Training has {ours:,} of {published:,} steps, and its warm-up accordingly."
        )
    ablation = share.ablation_steps
    if ablation and ablation[0] < ablation[1]:
        sentences.append("Ablations are cut to {:,} of {:,} steps.".format(*ablation))
    files = ", ".join(Path(source.path).name for source in recipe.data.sources)
    if files != paper.data.name:
        sentences.append(
            f"Trained on {files} instead of {paper.data.name} ({paper.data.rows:,} rows)."
        )
    sentences += paper.departures(recipe, share)
    rows = share.transfer_rows_per_split
    if rows is not None and {names.TRANSFER_BASE, names.TRANSFER_TRAINED} & set(selected):
        sentences.append(f"Transfer tasks have at most {rows:,} rows a split.")
    pairs, all_pairs = share.icl_pairs
    if names.SEARCH in selected and pairs < all_pairs:
        sentences.append(
            f"Demonstrations are chosen by {pairs:,} of {all_pairs:,} pairs of {names.DEV_SET}."
        )
    return sentences + [f"Set by the user: {assignment}." for assignment in request.overrides]
