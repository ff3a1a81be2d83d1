"""A run's own scores: of the base model, of the adapter on the way, and of what is kept."""

from __future__ import annotations

from typing import Protocol

from safetensors.torch import load_file

from lowmem_cft.data.tokens import query_format
from lowmem_cft.evaluation.sts.score import SetScore, score_set
from lowmem_cft.evaluation.sts.sets import LoadedSet
from lowmem_cft.model.backbone import readable_weights
from lowmem_cft.progress import Says
from lowmem_cft.run_folder import RunFolder
from lowmem_cft.training.card import adapter_card
from lowmem_cft.training.checkpoint import load_adapter_state, save_adapter
from lowmem_cft.training.job import TrainingJob
from lowmem_cft.training.records import Progress


class ScoreObserver(Says, Protocol):
    """Is told of scores."""

    def scored(self, step: int, scores: list[SetScore]) -> None: ...


class Scoring:
    """Scores a job's model on its recipe's STS sets, and keeps the best adapter where asked to.

    Args:
        folder: holds the best adapter.
        progress: the run's; the base model's scores and the best score are noted there.
    """

    def __init__(
        self, job: TrainingJob, folder: RunFolder, observer: ScoreObserver, progress: Progress
    ) -> None:
        self.job, self.folder, self.observer, self.progress = job, folder, observer, progress
        self.keeps_best = job.recipe.eval.keep_best

    def score_base(self) -> None:
        """Score the base model on the sets that were not scored when the run began."""
        known = {(score.name, score.num_pairs): score for score in self.progress.before}
        sets = self.job.eval_sets
        new = [loaded for loaded in sets if (loaded.name, len(loaded.pairs)) not in known]
        if new:
            with self.job.encoder.model.disable_adapter():
                scores = self._scores(new)
            self.observer.scored(0, scores)
            known |= {(score.name, score.num_pairs): score for score in scores}
        self.progress.before = [known[loaded.name, len(loaded.pairs)] for loaded in sets]

    def is_due(self, step: int) -> bool:
        """Whether the first set is scored after this many steps."""
        every = self.job.recipe.eval.every
        last = step == self.job.num_steps
        return bool(self.job.eval_sets and every and (step % every == 0 or last))

    def score_first_set(self, step: int) -> SetScore:
        """Score the adapter on the first set, and keep it if it is the best so far.

        Raises:
            ValueError: embeddings are not finite.
        """
        scores = self._scores(self.job.eval_sets[:1])
        self.observer.scored(step, scores)
        best = self.progress.best_score
        if self.keeps_best and (best is None or scores[0].spearman > best):
            self.progress.best_score = scores[0].spearman
            self.progress.best_step = step
            card = adapter_card(self.job.recipe, self.job.backbone)
            save_adapter(self.job.encoder.model, self.folder.best, card)
        return scores[0]

    def take_best(self) -> None:
        """Put the best adapter in the model, where the recipe keeps it."""
        if not self.keeps_best or not self.folder.best.is_dir():
            return
        with readable_weights(str(self.folder.best)):
            best = load_file(str(self.folder.best / "adapter_model.safetensors"))
        load_adapter_state(self.job.encoder.model, best)
        self.observer.say(f"kept the adapter of step {self.progress.best_step}")

    def score_all(self, step: int) -> list[SetScore]:
        """Score the adapter as it is saved on every set."""
        scores = self._scores(self.job.eval_sets)
        if scores:
            self.observer.say("scores of the adapter as it is saved, in the dtype of its base:")
        self.observer.scored(step, scores)
        return scores

    def _scores(self, sets: list[LoadedSet]) -> list[SetScore]:
        job, recipe = self.job, self.job.recipe
        return [
            score_set(
                job.encoder,
                job.backbone.tokenizer,
                loaded,
                query_format(recipe),
                recipe.eval.token_budget,
            )
            for loaded in sets
        ]
