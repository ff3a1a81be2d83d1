"""The two papers that can be reproduced: what may be asked for, and how much of it is done.

cft         Improving Text Embeddings for Smaller Language Models Using Contrastive
            Fine-tuning (arXiv 2408.00690)
prompteol   Scaling Sentence Embeddings with Large Language Models (arXiv 2307.16645)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmem_cft.evaluation.sts.protocols import PROTOCOLS, Protocol
from lowmem_cft.recipe.load import load_recipe, preset_names
from lowmem_cft.recipe.schema import Recipe

PAPERS = ("cft", "prompteol")

PUBLISHED_ROWS = 275_601
"""Of nli_for_simcse.csv, which both papers train on."""
PUBLISHED_DATA = "nli_for_simcse.csv"
PUBLISHED_DATA_URL = (
    "https://huggingface.co/datasets/princeton-nlp/datasets-for-simcse/resolve/main/"
    + PUBLISHED_DATA
)
ABLATION_STEPS = 500
"""The first paper's, by the checkpoints of its learning-rate runs."""
LEARNING_RATES = ("5e-5", "5e-4", "5e-3")
"""The first paper's ablation."""
DEV_SET, DEV_PAIRS = "STSBenchmark-dev", 1500
"""What ablations, curves and the choice of a demonstration are scored on."""


def num_steps(recipe: Recipe) -> int:
    """Over the published data, the last and smaller batch of an epoch counted, as the papers do."""
    train = recipe.train
    if train.steps is not None:
        return train.steps
    return math.ceil((train.epochs or 1.0) * PUBLISHED_ROWS / train.logical_batch)


def models(paper: str) -> list[str]:
    """The models that a paper's run is known for."""
    prefix = f"{paper}-"
    return [name.removeprefix(prefix) for name in preset_names() if name.startswith(prefix)]


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
        if self.paper not in PAPERS:
            raise ValueError(f"paper: got {self.paper!r}, wanted one of {', '.join(PAPERS)}")
        if self.model not in models(self.paper):
            raise ValueError(
                f"`model`: got {self.model!r}; {self.paper} has {', '.join(models(self.paper))}"
            )
        if self.hours is not None and not self.hours > 0:
            raise ValueError(f"`hours`: got {self.hours:g}, wanted more than 0")

    @property
    def is_cft(self) -> bool:
        return self.paper == "cft"

    @property
    def recipe_name(self) -> str:
        return f"{self.paper}-{self.model}"

    @property
    def protocol(self) -> Protocol:
        """The paper's own."""
        return PROTOCOLS["mteb" if self.is_cft else "senteval"]

    @property
    def published_steps(self) -> int:
        """Optimizer steps of one epoch, by the paper's recipe whatever the user set."""
        return num_steps(load_recipe(self.recipe_name))

    @property
    def whole_steps(self) -> int:
        """Optimizer steps of the uncut run as the user set it."""
        return num_steps(self.recipe())

    def recipe(self, assignments: Sequence[str] = ()) -> Recipe:
        """The paper's at full size, with what the user set and with more put over it."""
        budget = [] if self.budget is None else [f"memory.limit={self.budget}"]
        return load_recipe(self.recipe_name, [*self.overrides, *budget, *assignments])


@dataclass(frozen=True)
class Share:
    """How much of the published run is done; pairs of numbers are ours and the published.

    `transfer_rows_per_split` is None where all rows count, `ablation_steps` where the paper has no
    ablations.
    """

    training_steps: tuple[int, int]
    ablation_steps: tuple[int, int] | None
    transfer_rows_per_split: int | None
    icl_pairs: tuple[int, int]

    def describe(self) -> str:
        """In one sentence."""
        ours, published = self.training_steps
        said = f"{ours:,} of the paper's {published:,} training steps ({ours / published:.1%})"
        if self.ablation_steps is not None:
            said += "; ablations of {:,} of {:,} steps".format(*self.ablation_steps)
        return said


def departures(request: Request, share: Share, selected: Sequence[str]) -> list[str]:
    """Where a run is not the paper's, a sentence each.

    Args:
        selected: names of the stages that are done.
    """
    recipe = request.recipe()
    said = []
    if request.model == "smollm2-135m":
        said.append("The model is not one of the paper's: no published figure belongs to it.")
    ours, published = share.training_steps
    if ours != published:
        said.append(f"Training has {ours:,} of {published:,} steps, and its warm-up accordingly.")
    ablation = share.ablation_steps
    if ablation and ablation[0] < ablation[1]:
        said.append("Ablations are cut to {:,} of {:,} steps.".format(*ablation))
    names = ", ".join(Path(source.path).name for source in recipe.data.sources)
    if names != "nli_for_simcse.csv":
        said.append(f"Trained on {names} instead of nli_for_simcse.csv ({PUBLISHED_ROWS:,} rows).")
    if request.is_cft:
        if recipe.model.quantization == "nf4":
            said.append("The frozen base is held in 4 bits (NF4); the paper trained bf16 weights.")
        said.append(
            "The end-of-sequence token is appended and read for every model; the paper's way of "
            "setting it has no effect on Phi-2's tokenizer."
        )
        said.append(
            "Without hard negatives the paper also changed batch size and learning rate; here "
            "nothing else differs."
        )
    else:
        if recipe.model.quantization == "nf4":
            said.append(
                "Models are scored with 4-bit weights (NF4); the published figures are of 16-bit ones."
            )
        if ours != published:
            said.append(
                "The best of about ten checkpoints is kept, where the paper has one in 50 steps."
            )
    rows = share.transfer_rows_per_split
    if rows is not None and any(name.startswith("transfer") for name in selected):
        said.append(f"Transfer tasks have at most {rows:,} rows a split.")
    if "icl-search" in selected and share.icl_pairs[0] < share.icl_pairs[1]:
        said.append(
            "Demonstrations are chosen by {:,} of {:,} pairs of {}.".format(
                *share.icl_pairs, DEV_SET
            )
        )
    return said + [f"Set by the user: {one}." for one in request.overrides]
