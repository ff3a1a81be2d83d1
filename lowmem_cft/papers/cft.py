"""Improving Text Embeddings for Smaller Language Models Using Contrastive Fine-tuning.

arXiv 2408.00690: MiniCPM-2B, Phi-2 and Gemma-2B, each trained once, and ablations.
"""

from __future__ import annotations

import json

from lowmem_cft.papers import names
from lowmem_cft.papers.paper import Ablation, Paper, PaperFacts, Share, TrainingData, preset_recipes
from lowmem_cft.papers.published import published_rows
from lowmem_cft.recipe.schema import Recipe

NLI = TrainingData(
    "nli_for_simcse.csv",
    "https://huggingface.co/datasets/princeton-nlp/datasets-for-simcse/resolve/main/"
    "nli_for_simcse.csv",
    275_601,
)
"""The rows that both papers train on."""

ONE_WORD = 'This sentence: "{text}" means in one word: '
"""The prompt that the paper's evaluation code had before it was taken out."""

FACTS = PaperFacts(
    title="Improving Text Embeddings for Smaller Language Models Using Contrastive Fine-tuning",
    arxiv="2408.00690",
    protocol="mteb",
    models={"minicpm-2b": "MiniCPM-2B", "phi-2": "Phi-2", "gemma-2b": "Gemma-2B"},
    notes=(
        'The mean is over nine sets, and SICK-R is all 9,927 pairs of it. The "± 4.27" that is '
        "quoted with MiniCPM's 83.84 is the spread over the nine sets, not over runs; its "
        '"56.33 %" gain is 83.84 less 27.51, in points.',
        "How long the released adapters were trained is not certain: one epoch at their batch of "
        "60 is 4,594 steps, yet a checkpoint of step 12,500 exists for Gemma. The script in the "
        "repository (batch 28, 1,000 steps) is not their recipe.",
        "No figures of the paper's ablations were found in a source that could be opened. Its "
        "adapter without hard negatives was also trained with another batch (40) and learning rate "
        "(1e-5), and takes the other rows' anchors for negatives.",
    ),
)


def _learning_rate(rate: str) -> Ablation:
    what = f"learning rate {rate}"
    return Ablation(f"ablation-lr-{rate}", what, "train.learning_rate", rate, "Learning rate")


def _departures(recipe: Recipe, share: Share) -> list[str]:
    sentences = []
    if recipe.model.quantization == "nf4":
        sentences.append("The frozen base is held in 4 bits (NF4); the paper trained bf16 weights.")
    return [
        *sentences,
        "The end-of-sequence token is appended and read for every model; the paper's way of "
        "setting it has no effect on Phi-2's tokenizer.",
        "Without hard negatives the paper also changed batch size and learning rate; here nothing "
        "else differs.",
    ]


CFT = Paper(
    name="cft",
    facts=FACTS,
    clean_up=False,
    data=NLI,
    recipes=preset_recipes("cft"),
    stages=(names.DATA, names.BASE, names.TRAIN, names.EVALUATE),
    beyond=(names.SEARCH, names.TRANSFER_BASE, names.TRANSFER_TRAINED),
    ablations=(
        *(_learning_rate(rate) for rate in ("5e-5", "5e-4", "5e-3")),
        Ablation(
            "ablation-base", "the recipe as it is", "train.learning_rate", None, "Learning rate"
        ),
        # quoted as YAML reads it: the prompt has quotes and a colon of its own
        Ablation(
            "ablation-prompt",
            "with a prompt",
            "text.template",
            json.dumps(ONE_WORD),
            "Prompt or none",
        ),
        Ablation(
            "ablation-no-hard-negatives",
            "without hard negatives",
            "loss.hard_negatives",
            "none",
            "With and without hard negatives",
        ),
    ),
    ablation_steps=500,  # by the checkpoints of the paper's learning-rate runs
    search_recipe="prompteol-smollm2-135m",  # all of PromptEOL have the same text section
    published_length="one epoch's",  # the paper does not say how long its adapters were trained
    departures=_departures,
    rows=published_rows("cft"),
)
