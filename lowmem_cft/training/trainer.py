"""The training loop.

    texts of a step -> embeddings -> loss -> gradients -> adapter -> a line of the log

The loss is over the whole logical batch; chunks are how it is computed and change nothing.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any, Protocol

import torch

from lowmem_cft import machine
from lowmem_cft.evaluation.sts.protocols import SCORED
from lowmem_cft.evaluation.sts.score import SetScore
from lowmem_cft.gradient.oom import try_in_memory
from lowmem_cft.gradient.step import LossReport, StepReport
from lowmem_cft.run_folder import RunFolder
from lowmem_cft.training.card import adapter_card
from lowmem_cft.training.checkpoint import (
    TrainingState,
    adapter_state,
    load_adapter_state,
    save_adapter,
    save_state,
)
from lowmem_cft.training.health import NegativesWatch
from lowmem_cft.training.interrupt import Interrupted, finish_step_on_interrupt
from lowmem_cft.training.job import TrainingJob
from lowmem_cft.training.optimizer import set_rates
from lowmem_cft.training.records import Metrics, Progress, StepLine, append_line, truncate_log
from lowmem_cft.training.scoring import ScoreObserver, Scoring
from lowmem_cft_kernels import LossPath

_LOSS_PATHS = {
    LossPath.REFERENCE: "the formula as it stands",
    LossPath.CHUNKED: "PyTorch, block by block",
    LossPath.TRITON: "fused kernels on the GPU",
}


class Observer(ScoreObserver, Protocol):
    """Is told how training goes."""

    def begin(self, num_steps: int, done: int) -> None: ...

    def step(self, line: StepLine) -> None: ...


class Trainer:
    """Trains a job from its first step, or from a checkpoint, to its scores.

    Args:
        job: what is trained, and on what.
        folder: the run's folder, open.
        observer: told of progress.
        state: the checkpoint to go on from.
        new_rate: the learning rate may be higher than the one that the checkpoint would go on with.

    Raises:
        ValueError: the checkpoint is beyond the job's last step, it began with other rows, or its
            learning rate would rise.
    """

    def __init__(
        self,
        job: TrainingJob,
        folder: RunFolder,
        observer: Observer,
        state: TrainingState | None = None,
        *,
        new_rate: bool = False,
    ) -> None:
        self.job, self.folder, self.observer = job, folder, observer
        self.plan = job.plan
        self.step_index = 0
        self.progress = Progress() if state is None else state.progress
        self.scoring = Scoring(job, folder, observer, self.progress)
        self.negatives = NegativesWatch(job.recipe.loss, observer, self.progress)
        self._loss_path: LossPath | None = None
        self._updating = False
        self._saved_at = time.monotonic()
        self._step_seconds = 0.0
        self._visible_share = 1.0
        if state is not None:
            self._restore(state, new_rate=new_rate)

    # -- the loop -----------------------------------------------------------------------------

    def train(self) -> Metrics:
        """Run all steps left, evaluate, and give the metrics.

        Raises:
            Interrupted: Ctrl-C; the state is saved.
            RuntimeError: the loss is not finite, no negatives are left, memory ran out, or saving
                failed.
        """
        num_steps = self.job.num_steps
        self.scoring.score_base()
        self.observer.begin(num_steps, self.step_index)
        with finish_step_on_interrupt(self._announce_stop) as interrupted:
            while self.step_index < num_steps:
                line = self._step_or_save()
                if self.scoring.is_due(self.step_index):
                    line = self._score_or_save(line)
                append_line(self.folder, line)
                self.observer.step(line)
                if reason := self.negatives.reason_to_stop(line, self._visible_share):
                    self.save()
                    raise RuntimeError(reason)
                done = self.step_index == num_steps
                if interrupted() and not done:
                    self.save()
                    raise Interrupted(
                        f"stopped after step {self.step_index} of {num_steps}; all is saved in "
                        f"{self.folder.checkpoint}; go on with the same command and `resume`"
                    )
                if done or self._save_is_due():
                    self.save()
        return self._finish()

    def _step_or_save(self) -> StepLine:
        """One step; if it fails before the weights changed, what was reached is saved first."""
        reached = self.step_index
        try:
            return self.step()
        except RuntimeError:  # out of memory, or a loss that is no number
            self.job.optimizer.zero_grad(set_to_none=True)
            if reached and self.step_index == reached and not self._updating:
                self.save()
            raise

    def _save_is_due(self) -> bool:
        section = self.job.recipe.train
        minutes = (time.monotonic() - self._saved_at) / 60
        return (section.save_every is not None and self.step_index % section.save_every == 0) or (
            section.save_minutes is not None and minutes >= section.save_minutes
        )

    def _announce_stop(self) -> None:
        about = f", about {self._step_seconds:.0f} s" if self._step_seconds >= 1 else ""
        self.observer.say(
            f"finishing step {self.step_index + 1}{about}, then saving it; Ctrl-C again to stop now, "
            "which loses it"
        )

    def _score_or_save(self, line: StepLine) -> StepLine:
        """The line with the first set's score; if there is none, the step is saved first."""
        try:
            score = self.scoring.score_first_set(self.step_index)
        except ValueError:  # embeddings that are not finite
            append_line(self.folder, line)
            self.save()
            raise
        return line.model_copy(update={"eval_set": score.name, "spearman": score.spearman})

    # -- one step ---------------------------------------------------------------------------

    def step(self) -> StepLine:
        """Train on the next logical batch; gives its log line.

        Raises:
            RuntimeError: the loss is not finite, or not even the smallest chunks fit in memory.
        """
        started = time.perf_counter()
        report = self._add_gradient()
        loss = float(report.loss)
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss of step {self.step_index + 1} is {loss}; lower train.learning_rate or "
                "raise loss.temperature; what was reached before it is kept"
            )
        learning_rate = float(self.job.scheduler.get_last_lr()[0])
        self._updating = True
        gradient_norm = self._update()
        self._updating = False
        seconds = time.perf_counter() - started
        self.step_index += 1
        self.progress.add(seconds, report.texts, report.tokens, report.padded_tokens)
        self._step_seconds = seconds
        return StepLine(
            step=self.step_index,
            loss=loss,
            **_of_the_batch(report.loss_report),
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            rows_per_s=self.job.recipe.train.logical_batch / seconds,
            tokens_per_s=report.tokens / seconds,
            texts=report.texts,
            padding_share=report.padding_share,
            backward_tokens=self.plan.backward_tokens,
            forward_tokens=self.plan.forward_tokens,
            kept_tokens=self.plan.kept_tokens,
            step_ms=seconds * 1000,
            peak_bytes=machine.peak_bytes(self.job.device),
        )

    def _add_gradient(self) -> StepReport:
        """Add the next batch's gradient to `.grad`; the observer is told how it is computed."""
        job = self.job
        texts = job.texts_of(self.step_index)
        self._visible_share = job.visible_share(texts)
        with job.encoder.training_mode(self.step_index):
            report = job.compute(texts, self.plan, gradient_scale=job.scaler.get_scale())
        if report.plan != self.plan:
            self.plan = report.plan
            self.observer.say(f"memory ran out; from now on: {self.plan.describe()}")
        if report.loss_report.path != self._loss_path:
            self._loss_path = report.loss_report.path
            how = _LOSS_PATHS[self._loss_path]
            self.observer.say(f"loss by the {self._loss_path.value} path: {how}")
            self.observer.say(f"attention kernels: {', '.join(job.encoder.attention)}")
        return report

    def _update(self) -> float:
        """Clip the gradient and update the weights; gives the norm before clipping."""
        job = self.job
        job.scaler.unscale_(job.optimizer)
        limit = job.recipe.train.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(job.trained, limit))
        # What the first update allocates comes before it changes a weight, so it can be repeated.
        if not try_in_memory(partial(job.scaler.step, job.optimizer)):
            job.scaler.step(job.optimizer)
        job.scaler.update()
        job.optimizer.zero_grad(set_to_none=True)
        job.scheduler.step()
        return norm

    # -- the checkpoint ---------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint."""
        job = self.job
        state = TrainingState(
            step=self.step_index,
            adapter=adapter_state(job.encoder.model),
            optimizer=job.optimizer.state_dict(),
            scheduler=job.scheduler.state_dict(),
            scaler=job.scaler.state_dict(),
            progress=self.progress,
            plan=self.plan,
            temperature={} if job.temperature is None else job.temperature.state_dict(),
            rows_sha256=job.rows_sha256,
        )
        save_state(self.folder, state)
        self._saved_at = time.monotonic()

    def _restore(self, state: TrainingState, *, new_rate: bool) -> None:
        job = self.job
        if state.step > job.num_steps:
            raise ValueError(
                f"`resume`: the run has done {state.step} steps, and the recipe wants "
                f"{job.num_steps}; give train.steps={state.step} or more"
            )
        self._check_rows(state)
        load_adapter_state(job.encoder.model, state.adapter)
        self._restore_rates(state, new_rate=new_rate)
        job.scaler.load_state_dict(state.scaler)
        if job.temperature is not None:
            job.temperature.load_state_dict(state.temperature)
        self.step_index = state.step
        truncate_log(self.folder, state.step)
        self.observer.say(f"going on after step {state.step}")

    def _check_rows(self, state: TrainingState) -> None:
        job = self.job
        if not state.rows_sha256:
            return  # a checkpoint of an older version
        sources = zip(job.recipe.data.sources, state.rows_sha256, job.rows_sha256, strict=True)
        changed = [source.path for source, then, now in sources if then != now]
        if changed:
            raise ValueError(
                f"`resume`: {', '.join(changed)}: the rows are others than those that the run began "
                "with; put the old ones back, or start a new run"
            )

    def _restore_rates(self, state: TrainingState, *, new_rate: bool) -> None:
        """Restore the optimizer, and follow this recipe's schedule from the step reached."""
        job = self.job
        base_rates = [float(rate) for rate in job.scheduler.base_lrs]
        job.optimizer.load_state_dict(state.optimizer)
        job.scheduler.load_state_dict(state.scheduler)
        last = float(job.optimizer.param_groups[0]["lr"])
        set_rates(job.optimizer, job.scheduler, base_rates)
        rate = float(job.optimizer.param_groups[0]["lr"])
        if rate > last and not new_rate:
            raise ValueError(
                f"`resume`: the learning rate of step {state.step + 1} would rise from {last:g} to "
                f"{rate:g} with {job.num_steps} steps in all; allow it with `new_rate`, which takes "
                "another train.learning_rate and train.schedule as well"
            )
        if rate != last and state.step < job.num_steps:
            self.observer.say(
                f"learning rate of step {state.step + 1}: {rate:g}, where {last:g} was planned"
            )

    # -- the end ------------------------------------------------------------------------------

    def _finish(self) -> Metrics:
        job = self.job
        self.scoring.take_best()
        # Loaders hold an adapter in its base's dtype: what is scored and saved is that adapter.
        for parameter in job.parameters:
            parameter.data = parameter.data.to(job.backbone.dtype)
        card = adapter_card(job.recipe, job.backbone)
        save_adapter(job.encoder.model, self.folder.adapter, card)
        metrics = self._metrics(self.scoring.score_all(self.step_index))
        metrics.write(self.folder)
        return metrics

    def _metrics(self, scores: list[SetScore]) -> Metrics:
        job, progress = self.job, self.progress
        rows = self.step_index * job.recipe.train.logical_batch
        extras: dict[str, Any] = {}  # written where they were set
        if job.temperature is not None:
            extras["temperature"] = job.temperature().item()
        if job.recipe.eval.keep_best:
            extras["best_step"] = progress.best_step
        return Metrics(
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
            peak_bytes=machine.peak_bytes(job.device),
            device=machine.device_name(job.device),
            attention=job.encoder.attention,
            versions=machine.library_versions(),
            **extras,
        )


def _of_the_batch(report: LossReport) -> dict[str, Any]:
    """The fields of a log line that the loss observes; JSON has no NaN, so no negatives are None."""
    values = {name: float(value) for name, value in vars(report.observed).items()}
    fields = {name: None if math.isnan(value) else value for name, value in values.items()}
    if report.temperature is not None:
        fields["temperature"] = float(report.temperature)
    return fields
