"""What the stages of a reproduction cost, before they are done: FLOPs, time on this device, memory.

Arithmetic is counted by tracing the model's shapes (see `tracing`); the time is that over a rate,
measured on two layers of the model, or on the stages that are done. It is an estimate: reading,
tokenising, classifiers and de-quantisation are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from lowmem_cft.data.tokens import TextFormat, query_format, tokenize
from lowmem_cft.machine import choose_device, choose_dtype
from lowmem_cft.model.backbone import load_tokenizer
from lowmem_cft.model.configs import config_without_weights
from lowmem_cft.model.sources import at_hand
from lowmem_cft.papers.records import StageRecord
from lowmem_cft.papers.results import Kind
from lowmem_cft.papers.stages import Effort
from lowmem_cft.planning.choice import Planner
from lowmem_cft.planning.limits import plan_limit
from lowmem_cft.planning.recipe_plan import plan_recipe, planner_for
from lowmem_cft.recipe.schema import Recipe

# the slice of the model whose speed is measured, and what it is fed
_SLICE_LAYERS = 2
_SLICE_TEXTS, _SLICE_TOKENS = 64, 16
# most tokens that a template and special tokens put around a text
_AROUND = 32
# of English text, where no tokenizer is at hand
_CHARACTERS_PER_TOKEN = 4


class Efforts:
    """Estimates for the stages of a recipe on this machine.

    Raises:
        ValueError: the model's configuration is not to be had, or its step does not fit.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.device = choose_device()
        self.dtype = choose_dtype(recipe.model.dtype, self.device)
        self._steps: dict[object, Effort] = {}

    @cached_property
    def _planner(self) -> Planner:
        longest = self.recipe.text.max_tokens + _AROUND
        return planner_for(self.recipe, self.device.type, self.dtype, longest)

    def _forward_flops(self, tokens: float, width: float) -> float:
        cost = self._planner.footprint.chunk_costs("none")
        width = max(2, round(width))
        return tokens * cost(1.0, width).forward_flops / width

    def embed(self, texts: Sequence[str], text_format: TextFormat | None = None) -> Effort:
        """The effort of embedding the distinct ones of the texts, in the evaluation's chunks."""
        distinct = list(dict.fromkeys(texts))
        lengths = self._lengths(distinct, text_format or query_format(self.recipe))
        weights = self._planner.fixed_parts()
        held = sum(weights[part] for part in ("weights_4bit", "weights", "context"))
        budget = min(self.recipe.eval.token_budget, int(lengths.sum()))
        chunk = self._planner.chunk(budget, 0).forward_bytes
        return Effort(
            self._forward_flops(float(lengths.sum()), float(lengths.mean())), int(held + chunk)
        )

    @cached_property
    def _tokenizer(self) -> Any:
        """None where the model is not on this machine."""
        source = at_hand(self.recipe.model.id, self.recipe.model.revision)
        return None if source is None else load_tokenizer(source, None)

    def _lengths(self, texts: list[str], text_format: TextFormat) -> Any:
        if self._tokenizer is None:
            around = text_format.head + text_format.tail
            return np.array([len(around + text) / _CHARACTERS_PER_TOKEN for text in texts])
        return tokenize(self._tokenizer, texts, text_format).lengths

    def step(self, recipe: Recipe) -> Effort:
        """The effort of a training step; the recipe may differ in what ablations change."""
        costs = (recipe.text, recipe.loss.hard_negatives)  # and nothing else that they change
        if costs not in self._steps:
            device_type, limit = plan_limit(recipe, None, None)
            prediction = plan_recipe(recipe, device_type, limit).prediction
            self._steps[costs] = Effort(prediction.flops, prediction.peak_bytes)
        return self._steps[costs]

    # -- time -----------------------------------------------------------------------------------

    def rates(self, records: Iterable[StageRecord[Any]]) -> dict[Kind, float]:
        """FLOP/s by kind of stage: as the stages that are done had it, else as measured now."""
        done: dict[Kind, tuple[float, float]] = {}
        for record in records:
            flops, seconds = done.get(record.kind, (0.0, 0.0))
            done[record.kind] = (flops + (record.flops or 0.0), seconds + record.seconds)
        known = {kind: flops / seconds for kind, (flops, seconds) in done.items() if seconds > 1}
        kinds: tuple[Kind, ...] = ("evaluate", "train", "search", "transfer")
        wanting = [kind for kind in kinds if not known.get(kind)]
        measured = self._measured_rate if wanting else 0.0
        return {kind: known.get(kind) or measured for kind in kinds}

    @cached_property
    def _measured_rate(self) -> float:
        """FLOP/s of a forward through two of the model's layers in its dtype; random weights."""
        from transformers import AutoModel

        model = self.recipe.model
        layers = min(_SLICE_LAYERS, model.keep_layers or _SLICE_LAYERS)
        config = config_without_weights(model.model_copy(update={"keep_layers": layers}))
        config.vocab_size, config.pad_token_id = 128, None
        part = AutoModel.from_config(config, dtype=self.dtype).to(self.device).eval()
        ids_BT = torch.zeros((_SLICE_TEXTS, _SLICE_TOKENS), dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            with FlopCounterMode(display=False) as counter:
                part(input_ids=ids_BT, use_cache=False)
            times = []
            for _ in range(5):
                started = time.perf_counter()
                part(input_ids=ids_BT, use_cache=False)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
        return float(counter.get_total_flops() / np.median(times))
