"""Scaling Sentence Embeddings with Large Language Models.

arXiv 2307.16645 (PromptEOL): OPT and LLaMA, with a demonstration, and trained; transfer tasks.
"""

from __future__ import annotations

from lowmem_cft.papers import names
from lowmem_cft.papers.cft import NLI
from lowmem_cft.papers.paper import Paper, PaperFacts, Share, preset_recipes
from lowmem_cft.papers.published import published_rows
from lowmem_cft.recipe.schema import Recipe

FACTS = PaperFacts(
    title="Scaling Sentence Embeddings with Large Language Models",
    arxiv="2307.16645",
    protocol="senteval",
    models={
        **{f"opt-{size.lower()}": f"OPT {size}" for size in ("125M", "350M", "1.3B", "2.7B")},
        **{f"opt-{size.lower()}": f"OPT {size}" for size in ("6.7B", "13B", "30B", "66B")},
        **{f"llama-{size.lower()}": f"LLaMA {size}" for size in ("7B", "13B", "30B", "65B")},
    },
    notes=(
        "SICK-R is its test split alone, 4,927 pairs; the mean is over seven sets.",
        "The demonstration was chosen for each model on STS-B dev, out of 300, of which 100 are "
        "sentences of the STS-B training set: the figures with one are not unsupervised.",
        "The fine-tuned adapter is the best of those of every 50 steps on STS-B dev, scored with "
        "4-bit weights; it was tested with wider ones. The paper's text gives the temperature as "
        "0.5, its code has 0.05.",
        "transformers 4.52.0 to 4.52.3 scale OPT's attention twice "
        "(huggingface/transformers#38277): a figure of OPT that was made with one of them is of a "
        "broken model. The published ones were made with an older version.",
    ),
)


def _departures(recipe: Recipe, share: Share) -> list[str]:
    sentences = []
    if recipe.model.quantization == "nf4":
        sentences.append(
            "Models are scored with 4-bit weights (NF4); the published figures are of 16-bit ones."
        )
    ours, published = share.training_steps
    if ours != published:
        sentences.append(
            "The best of about ten checkpoints is kept, where the paper has one in 50 steps."
        )
    return sentences


PROMPTEOL = Paper(
    name="prompteol",
    facts=FACTS,
    clean_up=True,
    data=NLI,
    recipes=preset_recipes("prompteol"),
    stages=(
        names.DATA,
        names.BASE,
        names.SEARCH,
        names.WITH_DEMONSTRATION,
        names.TRAIN,
        names.EVALUATE,
        names.TRANSFER_BASE,
        names.TRANSFER_TRAINED,
    ),
    departures=_departures,
    rows=published_rows("prompteol"),
)
