"""The training loop: wires the stages, and is the only module that knows all of them.

    rows -> tokens -> pool of a step -> embeddings -> loss -> gradients -> adapter -> evaluation

The loss is over the whole logical batch; chunks are how it is computed and change nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem_cft import machine
from lowmem_cft.data import corpus
from lowmem_cft.data.batches import RowOrder, step_texts
from lowmem_cft.data.rows import TrainRow
from lowmem_cft.data.tokens import query_format
from lowmem_cft.evaluation.sts import score as evaluate
from lowmem_cft.evaluation.sts import sets
from lowmem_cft.evaluation.sts.protocols import SCORED
from lowmem_cft.evaluation.sts.score import SetScore
from lowmem_cft.files import cache_folder, whole_folder
from lowmem_cft.gradient.oom import try_in_memory
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.gradient.step import ContrastiveStep, LossReport
from lowmem_cft.machine import choose_device, choose_dtype, library_versions
from lowmem_cft.model.adapter import attach_adapter, set_checkpointing, trainable_parameters
from lowmem_cft.model.backbone import (
    Backbone,
    BackboneSource,
    find_backbone,
    load_backbone,
    readable_weights,
)
from lowmem_cft.model.dropout import DropoutClock
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.planning.choice import Planner
from lowmem_cft.planning.limits import cap_allocator, run_limit
from lowmem_cft.planning.recipe_plan import planner_for, shape_of
from lowmem_cft.progress import Says
from lowmem_cft.recipe.schema import LossSection, Recipe
from lowmem_cft.run_folder import RunFolder
from lowmem_cft.training.checkpoint import TrainingState, load_state, save_state
from lowmem_cft.training.interrupt import Interrupted, finish_step_on_interrupt
from lowmem_cft.training.optimizer import make_optimizer, make_scheduler
from lowmem_cft.training.records import Metrics, StepLine, append_line, truncate_log
from lowmem_cft.units import GIB
from lowmem_cft_kernels import LearnedTemperature, LossPath


class Observer(Says, Protocol):
    """Is told how training goes."""

    def begin(self, num_steps: int, done: int) -> None: ...

    def step(self, line: StepLine) -> None: ...

    def scored(self, step: int, scores: list[SetScore]) -> None: ...


@dataclass
class Progress:
    """What a resumed run carries on with besides weights."""

    seconds: float = 0.0
    texts: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    best_score: float | None = None
    best_step: int | None = None
    before: list[SetScore] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        before = [SetScore(**score) for score in values["before"]]
        return cls(**{**values, "before": before})


class Trainer:
    """One run from its recipe to its scores.

    Args:
        recipe: what to do.
        folder: the run's folder, open.
        observer: told of progress.
        rows: trained on in the place of the recipe's sources.
        resume: go on from the folder's checkpoint.
        device: the GPU where there is one, if not given.
        offline: data are looked for on this machine only.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        observer: Observer,
        *,
        rows: Sequence[TrainRow] | None = None,
        resume: bool = False,
        device: torch.device | None = None,
        offline: bool = False,
    ) -> None:
        self.recipe, self.folder, self.observer = recipe, folder, observer
        self.device = device or choose_device()
        sources = [rows] if rows is not None else _read_sources(recipe, observer, offline=offline)
        self.order = RowOrder(
            [len(source) for source in sources],
            [source.weight for source in recipe.data.sources],
            recipe.train.logical_batch,
            recipe.train.seed,
        )
        self.num_steps = recipe.train.num_steps(
            self.order.steps_per_epoch * recipe.train.logical_batch
        )
        data_folder = sets.data_folder()
        self.eval_sets = [
            sets.load_set(name, data_folder, recipe.eval.limit, offline=offline)
            for name in recipe.eval.sets
        ]
        source = find_backbone(recipe.model, observer.say)
        self.corpus = corpus.build_corpus(sources, recipe, source.tokenizer, cache_folder())
        where = "read from the cache" if self.corpus.from_cache else "tokenised once"
        observer.say(f"{len(self.corpus.store)} distinct texts, {where}")
        state = load_state(folder) if resume else None
        self.planner, self.plan = self._plan(source, state)
        machine.keep_freed_memory()
        machine.grow_cuda_blocks(self.device)
        self.backbone: Backbone = load_backbone(recipe.model, self.device, observer.say, source)
        self.encoder = self._make_encoder()
        self.parameters = trainable_parameters(self.encoder.model)
        self.temperature = _learned_temperature(recipe.loss, self.device)
        undecayed = [] if self.temperature is None else list(self.temperature.parameters())
        self.trained = [*self.parameters, *undecayed]
        self.optimizer = make_optimizer(
            self.parameters, recipe.train, self.device, undecayed=undecayed
        )
        self.scheduler = make_scheduler(self.optimizer, recipe.train, self.num_steps)
        scaled = self.backbone.dtype == torch.float16 and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        set_checkpointing(self.encoder.model, self.plan.checkpoint_every)
        self.compute = ContrastiveStep(
            self.encoder,
            self.corpus.store,
            self.backbone.tokenizer.pad_token_id,
            recipe.loss,
            self.parameters,
            self.planner.chunk_cost,
            self.temperature,
        )
        self._loss_path: LossPath | None = None
        self.step_index = 0
        self._updating = False
        self.progress = Progress()
        if state is not None:
            self._restore(state)

    def _make_encoder(self) -> Encoder:
        recipe, clock = self.recipe, DropoutClock(seed=self.recipe.train.seed)
        model = attach_adapter(
            self.backbone.model,
            recipe.lora,
            clock,
            seed=recipe.train.seed,
            revision=recipe.model.revision,
        )
        return Encoder(
            model,
            pooling=recipe.embedding.pooling,
            normalize=recipe.embedding.normalize,
            clock=clock,
        )

    def _plan(
        self, source: BackboneSource, state: TrainingState | None
    ) -> tuple[Planner, StepPlan]:
        """Plan the steps before weights are loaded; a resumed run keeps its plan if it can."""
        recipe = self.recipe
        cap_allocator(recipe, self.device)
        limit = run_limit(recipe, self.device)
        shape = shape_of(recipe, self.corpus)
        dtype = choose_dtype(recipe.model.dtype, self.device)
        planner = planner_for(recipe, self.device.type, dtype, shape.longest, source.config)
        found = planner.choose(recipe.memory, shape, limit)
        if state is not None:
            kept = planner.predict(StepPlan(**state.plan), shape)
            found = kept if kept.peak_bytes <= limit else found
        self.observer.say(
            f"plan: {found.plan.describe()}; about {found.peak_bytes / GIB:.2f} of "
            f"{limit / GIB:.2f} GiB, {found.relative_cost:.2f} times the cost of the plain step; "
            f"{planner.footprint.weights.num_trained:,} weights to train"
        )
        return planner, found.plan

    # -- one step ---------------------------------------------------------------------------

    def step(self) -> StepLine:
        """Train on the next logical batch; gives its log line."""
        started = time.perf_counter()
        recipe = self.recipe
        once = {"auto": recipe.lora.dropout == 0, "once": True, "each": False}
        texts = step_texts(
            self.corpus.table,
            self.order.rows(self.step_index),
            hard_negatives=recipe.loss.hard_negatives,
            mask_duplicates=recipe.loss.mask_duplicates,
            encode_twins_once=once[recipe.train.duplicates],
        )
        with self.encoder.training_mode(self.step_index):
            report = self.compute(texts, self.plan, gradient_scale=self.scaler.get_scale())
        if report.plan != self.plan:
            self.plan = report.plan
            self.observer.say(f"memory ran out; from now on: {self.plan.describe()}")
        if report.found.path != self._loss_path:
            self._loss_path = report.found.path
            self.observer.say(f"loss by the {self._loss_path.value} path")
            self.observer.say(f"attention by: {', '.join(self.encoder.attention)}")
        loss = float(report.loss)
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss of step {self.step_index + 1} is {loss}; lower train.learning_rate or "
                "raise loss.temperature; what was reached before it is kept"
            )
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self._updating = True
        gradient_norm = self._update()
        self._updating = False
        seconds = time.perf_counter() - started
        self.step_index += 1
        self.progress.seconds += seconds
        self.progress.texts += report.texts
        self.progress.tokens += report.tokens
        self.progress.padded_tokens += report.padded_tokens
        return StepLine(
            step=self.step_index,
            loss=loss,
            **_observed(report.found),
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            rows_per_s=recipe.train.logical_batch / seconds,
            tokens_per_s=report.tokens / seconds,
            texts=report.texts,
            padding_share=report.padding_share,
            backward_tokens=self.plan.backward_tokens,
            forward_tokens=self.plan.forward_tokens,
            kept_tokens=self.plan.kept_tokens,
            step_ms=seconds * 1000,
            peak_bytes=machine.peak_bytes(self.device),
        )

    def _step_or_save(self) -> StepLine:
        """One step; if it fails before the weights changed, what was reached is saved first."""
        before = self.step_index
        try:
            return self.step()
        except RuntimeError:  # out of memory, or a loss that is no number
            self.optimizer.zero_grad(set_to_none=True)
            if before and self.step_index == before and not self._updating:
                self.save()
            raise

    def _update(self) -> float:
        self.scaler.unscale_(self.optimizer)
        limit = self.recipe.train.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, limit))
        # What the first update allocates comes before it changes a weight, so it can be repeated.
        if not try_in_memory(partial(self.scaler.step, self.optimizer)):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return norm

    # -- state ------------------------------------------------------------------------------

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's tensors under peft's names, on the CPU."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.encoder.model, save_embedding_layers=False)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        outcome = set_peft_model_state_dict(self.encoder.model, state)
        assert not outcome.unexpected_keys, f"adapter names: {outcome.unexpected_keys[:3]}"

    def save(self) -> None:
        """Write the checkpoint."""
        state = TrainingState(
            step=self.step_index,
            adapter=self.adapter_state(),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            scaler=self.scaler.state_dict(),
            progress=self.progress.to_json(),
            plan=self.plan.to_json(),
            temperature={} if self.temperature is None else self.temperature.state_dict(),
        )
        save_state(self.folder, state)

    def _restore(self, state: TrainingState) -> None:
        self.load_adapter_state(state.adapter)
        self.optimizer.load_state_dict(state.optimizer)
        self.scheduler.load_state_dict(state.scheduler)
        self.scaler.load_state_dict(state.scaler)
        if self.temperature is not None:
            self.temperature.load_state_dict(state.temperature)
        self.step_index = state.step
        self.progress = Progress.from_json(state.progress)
        truncate_log(self.folder, state.step)
        self.observer.say(f"going on after step {state.step}")

    # -- evaluation ---------------------------------------------------------------------------

    def scores(self, sets: list[sets.LoadedSet]) -> list[SetScore]:
        """Spearman on the sets, with the adapter as it is now."""
        return [
            evaluate.score_set(
                self.encoder,
                self.backbone.tokenizer,
                loaded,
                query_format(self.recipe),
                self.recipe.eval.token_budget,
            )
            for loaded in sets
        ]

    def _score_before(self) -> None:
        """Score the base model on the sets that were not scored when the run began."""
        known = {(score.name, score.num_pairs): score for score in self.progress.before}
        new = [loaded for loaded in self.eval_sets if (loaded.name, len(loaded.pairs)) not in known]
        if new:
            with self.encoder.model.disable_adapter():
                scores = self.scores(new)
            self.observer.scored(0, scores)
            known |= {(score.name, score.num_pairs): score for score in scores}
        self.progress.before = [known[loaded.name, len(loaded.pairs)] for loaded in self.eval_sets]

    def _score_or_save(self, line: StepLine) -> StepLine:
        """The line with the first set's score; if there is none, the step is saved first."""
        try:
            score = self._score_now()
        except ValueError:  # embeddings that are not finite
            append_line(self.folder, line)
            self.save()
            raise
        return line.model_copy(update={"eval_set": score.name, "spearman": score.spearman})

    def _score_now(self) -> SetScore:
        scores = self.scores(self.eval_sets[:1])
        self.observer.scored(self.step_index, scores)
        best = self.progress.best_score
        if self.recipe.eval.keep_best and (best is None or scores[0].spearman > best):
            self.progress.best_score = scores[0].spearman
            self.progress.best_step = self.step_index
            with whole_folder(self.folder.best) as partial:
                self.encoder.model.save_pretrained(partial, save_embedding_layers=False)
        return scores[0]

    # -- the loop -----------------------------------------------------------------------------

    def train(self) -> Metrics:
        """Run all steps left, evaluate, and give the metrics.

        Raises:
            Interrupted: Ctrl-C; the state is saved.
            RuntimeError: the loss is not finite, memory ran out, or saving failed.
        """
        self._score_before()
        section = self.recipe.train
        self.observer.begin(self.num_steps, self.step_index)
        with finish_step_on_interrupt() as interrupted:
            while self.step_index < self.num_steps:
                line = self._step_or_save()
                done = self.step_index == self.num_steps
                every = self.recipe.eval.every
                if self.eval_sets and every and (self.step_index % every == 0 or done):
                    line = self._score_or_save(line)
                append_line(self.folder, line)
                self.observer.step(line)
                if interrupted() and not done:
                    self.save()
                    raise Interrupted(
                        f"stopped after step {self.step_index} of {self.num_steps}; all is saved in "
                        f"{self.folder.checkpoint}; go on with the same command and `resume`"
                    )
                if done or (section.save_every and self.step_index % section.save_every == 0):
                    self.save()
        return self._finish()

    def _finish(self) -> Metrics:
        if self.recipe.eval.keep_best and self.folder.best.is_dir():
            from safetensors.torch import load_file

            with readable_weights(str(self.folder.best)):
                best = load_file(str(self.folder.best / "adapter_model.safetensors"))
            self.load_adapter_state(best)
            self.observer.say(f"kept the adapter of step {self.progress.best_step}")
        # Loaders hold an adapter in its base's dtype: what is scored and saved is that adapter.
        for parameter in self.parameters:
            parameter.data = parameter.data.to(self.backbone.dtype)
        with whole_folder(self.folder.adapter) as partial:
            self.encoder.model.save_pretrained(partial, save_embedding_layers=False)
        scores = self.scores(self.eval_sets)
        self.observer.scored(self.step_index, scores)
        rows = self.step_index * self.recipe.train.logical_batch
        progress = self.progress
        extras: dict[str, Any] = {}
        if self.temperature is not None:
            extras["temperature"] = self.temperature().item()
        if self.recipe.eval.keep_best:
            extras["best_step"] = progress.best_step
        metrics = Metrics(
            before=progress.before,
            after=scores,
            protocol=SCORED,
            steps=self.step_index,
            rows=rows,
            train_seconds=progress.seconds,
            rows_per_s=rows / progress.seconds if progress.seconds else None,
            tokens_per_s=progress.tokens / progress.seconds if progress.seconds else None,
            padding_share=progress.padded_tokens / max(1, progress.tokens) - 1,
            plan=self.plan,
            peak_bytes=machine.peak_bytes(self.device),
            device=_device_name(self.device),
            attention=self.encoder.attention,
            versions=library_versions(),
            **extras,
        )
        metrics.write(self.folder)
        return metrics


def _read_sources(
    recipe: Recipe, observer: Observer, *, offline: bool
) -> Sequence[Sequence[TrainRow]]:
    sources, reports = corpus.read_sources(recipe.data, offline=offline)
    for report in reports:
        observer.say(
            f"{report.source}: {report.num_read} rows, {sum(report.skipped.values())} skipped"
        )
    return sources


def _learned_temperature(section: LossSection, device: torch.device) -> LearnedTemperature | None:
    if not section.learn_temperature:
        return None
    return LearnedTemperature(section.temperature, *section.temperature_bounds).to(device)


def _observed(found: LossReport) -> dict[str, Any]:
    """What a step's log line says of the batch; JSON has no NaN, which stands for no negatives."""
    values = {name: float(value) for name, value in vars(found.observed).items()}
    line = {name: None if math.isnan(value) else value for name, value in values.items()}
    if found.temperature is not None:
        line["temperature"] = float(found.temperature)
    return line


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
