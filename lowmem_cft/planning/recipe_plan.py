"""Plans a recipe before anything is loaded: `lowmem-cft plan`, and what training asks first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lowmem_cft.data import corpus
from lowmem_cft.data.batches import NO_TEXT
from lowmem_cft.data.columns import DataError
from lowmem_cft.data.tokens import (
    Tokenizer,
    TokenStore,
    document_format,
    query_format,
    surroundings,
    tokenize,
)
from lowmem_cft.machine import choose_dtype, dtype_name
from lowmem_cft.model import bounds
from lowmem_cft.model.backbone import load_tokenizer
from lowmem_cft.model.configs import config_without_weights
from lowmem_cft.model.sources import at_hand, check_is_model, may_be_on_hub, resolve
from lowmem_cft.model.trainable import check_trains, notes_on
from lowmem_cft.planning.choice import Planner
from lowmem_cft.planning.footprint import Footprint
from lowmem_cft.planning.prediction import BatchShape, Prediction
from lowmem_cft.planning.tracing import skeleton, with_layers
from lowmem_cft.recipe.schema import TEXT_SLOT, ModelSection, Recipe
from lowmem_cft.units import GIB

TABLE_LIMITS = tuple(gib * GIB for gib in (6, 8, 12, 16, 24))

_SAMPLE_ROWS = 2048
_CHARACTERS_PER_TOKEN = 3
"""Characters per token of a template whose tokenizer is not at hand: fewer than English has, so as
not to fall short."""


@dataclass(frozen=True)
class RecipePlan:
    """What `lowmem-cft plan` says.

    Attributes:
        limit_bytes: bytes that the run may take.
        device_type: "cuda" or "cpu".
        dtype: the compute dtype's name.
        max_logical_batch: the largest logical batch that fits, by limit in bytes.
        notes: what was assumed.
    """

    prediction: Prediction
    shape: BatchShape
    limit_bytes: int
    device_type: str
    dtype: str
    max_logical_batch: dict[int, int]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return {
            **self.prediction.to_json(),
            "limit_bytes": self.limit_bytes,
            "device": self.device_type,
            "dtype": self.dtype,
            "logical_batch": self.shape.rows,
            "texts_per_step": self.shape.slots,
            "longest_text_tokens": self.shape.longest,
            "max_logical_batch": {str(limit): n for limit, n in self.max_logical_batch.items()},
            "notes": self.notes,
        }


def shape_of(recipe: Recipe, data: corpus.Corpus) -> BatchShape:
    """The shape of steps on tokenised data."""
    table, lengths = data.table, data.store.lengths
    negatives = (table.negative_NK != NO_TEXT).sum(axis=1)
    if recipe.loss.hard_negatives == "none":
        negatives = negatives * 0
    sample = np.random.default_rng(0).permutation(len(table))[:_SAMPLE_ROWS]
    texts = [table.anchor_N[sample], table.positive_N[sample]]
    if recipe.loss.hard_negatives != "none":
        negative_NK = table.negative_NK[sample]
        texts.append(negative_NK[negative_NK != NO_TEXT])
    return BatchShape(
        rows=recipe.train.logical_batch,
        slots_per_row=2 + float(negatives.mean()),
        longest=int(lengths.max()),
        lengths=_shuffled(lengths[np.concatenate(texts)]),
    )


def _shuffled(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.random.default_rng(1).permutation(lengths)


def _assumed_shape(recipe: Recipe, longest: int) -> BatchShape:
    negatives = 0 if recipe.loss.hard_negatives == "none" else 1
    return BatchShape(recipe.train.logical_batch, 2 + negatives, longest)


def check_texts(recipe: Recipe, config: Any, tokenizer: Tokenizer, store: TokenStore) -> list[str]:
    """Refuse tokenised texts that the recipe's model cannot take; what to say of the others.

    Raises:
        ValueError: a token is beyond the embedding table, or a text that `max_tokens` allows
            beyond the positions. An export would fail at such a text if training did not.
    """
    tables, extra = skeleton(with_layers(config, 2), torch.float32), _overhead(recipe, tokenizer)
    bounds.check_ids(tables, tokenizer, store)
    bounds.check_length(tables, recipe.text.max_tokens + extra, extra)
    note = bounds.beyond_trained(config, int(store.lengths.max()))
    return [] if note is None else [note]


def _overhead(recipe: Recipe, tokenizer: Tokenizer) -> int:
    formats = (query_format(recipe), document_format(recipe))
    return max(surroundings(tokenizer, each).num_tokens for each in formats)


def _shape(recipe: Recipe, config: Any) -> tuple[BatchShape, list[str]]:
    """The shape from the data where model and data lie on this machine, else the worst case; notes."""
    name = at_hand(recipe.model.id, recipe.model.revision)
    if name is None:
        head, _, tail = recipe.text.template.partition(TEXT_SLOT)
        extra = 2 + math.ceil(len(head + tail) / _CHARACTERS_PER_TOKEN)
        longest = recipe.text.max_tokens + extra
        note = f"the tokenizer of {recipe.model.id} is not on this machine"
    else:
        revision = None if name != recipe.model.id else recipe.model.revision
        tokenizer = load_tokenizer(name, revision, bounds.num_ids(config))
        longest = recipe.text.max_tokens + _overhead(recipe, tokenizer)
        try:
            queries, documents = _sampled_texts(recipe)
        except DataError as error:
            note = f"no data: {error}"
            store = _tokenised(recipe, tokenizer, ["a"], ["a"])
            check_texts(recipe, config, tokenizer, store)
        else:
            store = _tokenised(recipe, tokenizer, queries, documents)
            notes = check_texts(recipe, config, tokenizer, store)
            shape = BatchShape(
                rows=recipe.train.logical_batch,
                slots_per_row=len(store) / len(queries),
                longest=longest,  # one that is not in the sample
                lengths=_shuffled(store.lengths),
            )
            return shape, notes
    assumed = _assumed_shape(recipe, longest)
    texts = f"{assumed.slots_per_row:g} texts a row, all of the greatest length ({longest} tokens)"
    return assumed, [f"{note}; assumed: {texts}"]


def _sampled_texts(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Queries and documents of a sample of the rows."""
    sources, _ = corpus.read_sources(recipe.data, offline=True)
    rows = [row for source in sources for row in source]
    sample = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:_SAMPLE_ROWS]]
    queries = [row.anchor for row in sample]
    documents = [row.positive for row in sample]
    if recipe.loss.hard_negatives != "none":
        documents += [text for row in sample for text in row.negatives]
    return queries, documents


def _tokenised(
    recipe: Recipe, tokenizer: Tokenizer, queries: list[str], documents: list[str]
) -> TokenStore:
    parts = ((queries, query_format(recipe)), (documents, document_format(recipe)))
    return TokenStore.concatenate([tokenize(tokenizer, *part) for part in parts])


def _find_config(section: ModelSection) -> Any:
    """`config_without_weights`, which says no more of a wrong name than transformers does."""
    check_is_model(section.id)
    try:
        return config_without_weights(section)
    except ValueError as error:
        path = Path(section.id).expanduser()
        no_model = path.is_dir() and not (path / "config.json").is_file()
        if no_model or isinstance(error.__cause__, OSError):  # or the hub cannot be reached
            _resolve(section)
        raise


def _resolve(section: ModelSection) -> None:
    try:
        resolve(section.id, section.revision)
    except ValueError as error:
        if not (may_be_on_hub(section.id) or Path(section.id).expanduser().is_dir()):
            raise
        raise ValueError(
            f"{error}; to plan, a folder with the model's config.json alone is enough"
        ) from None


def planner_for(
    recipe: Recipe, device_type: str, dtype: torch.dtype, longest: int, config: Any = None
) -> Planner:
    """A planner of the recipe's model; its configuration is found if not given.

    Raises:
        ValueError: there is no configuration, or `lora.targets` does not fit it.
    """
    config = _find_config(recipe.model) if config is None else config
    return Planner(Footprint(recipe, config, dtype, longest, device_type))


def plan_recipe(recipe: Recipe, device_type: str, limit_bytes: int) -> RecipePlan:
    """Plan a recipe's steps.

    Args:
        device_type: "cuda" or "cpu"; need not be on this machine.
        limit_bytes: bytes that the run may take.

    Raises:
        ValueError: the recipe's step does not fit, or its model is unknown.
    """
    config = _find_config(recipe.model)  # before all that takes the model's name for granted
    check_trains(config, recipe.model, recipe.lora)
    shape, notes = _shape(recipe, config)
    if device_type == "cuda" and not torch.cuda.is_available() and recipe.model.dtype == "auto":
        dtype = torch.bfloat16  # of any card since Ampere; earlier ones take as many bytes
    else:
        dtype = choose_dtype(recipe.model.dtype, torch.device(device_type))
    planner = planner_for(recipe, device_type, dtype, shape.longest, config)
    prediction = planner.choose(recipe.memory, shape, limit_bytes)
    return RecipePlan(
        prediction=prediction,
        shape=shape,
        limit_bytes=limit_bytes,
        device_type=device_type,
        dtype=dtype_name(dtype),
        max_logical_batch={
            limit: planner.max_rows(recipe.memory, shape, limit) for limit in TABLE_LIMITS
        },
        notes=[*notes_on(config), *notes],
    )
