"""The stages of a paper's run: what each depends on, what it does, what it costs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lowmem_cft.data.tokens import TextFormat
from lowmem_cft.evaluation.search import search as icl
from lowmem_cft.evaluation.search.demonstrations import SHIPPED, Demonstration, read_demonstrations
from lowmem_cft.evaluation.sts.sets import LoadedSet, data_folder, load_set, load_sets, sampled
from lowmem_cft.evaluation.transfer.tasks import SPECS, TransferTask, load_tasks
from lowmem_cft.files import digest, sha256_of
from lowmem_cft.papers import work as stage_work
from lowmem_cft.papers.effort import Efforts
from lowmem_cft.papers.request import (
    DEV_PAIRS,
    DEV_SET,
    LEARNING_RATES,
    PUBLISHED_DATA,
    PUBLISHED_DATA_URL,
    PUBLISHED_ROWS,
    Request,
    Share,
)
from lowmem_cft.papers.stages import Effort, Observer, Records, Stage
from lowmem_cft.papers.work import Unfinished
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.recipe.schema import Recipe

ONE_WORD = 'This sentence: "{text}" means in one word: '
"""The first paper's prompt, as its evaluation code had it before it was taken out."""

_TRAIN_POINTS, _ABLATION_POINTS = 10, 2
"""How often a cut training run is scored on its way."""
_CHECKPOINTS = 20
_ASSUMED_TEXT = "word " * 12
"""For estimates, where the sentences are not at hand."""

_NOT_INPUTS = ("memory", "output", "eval", "data")
"""Sections of a recipe that change nothing in what is trained, and the data, a stage of its own."""


class PaperStages:
    """Makes a request's stages; their results lie in the folder."""

    def __init__(self, request: Request, folder: Path, records: Records, *, offline: bool) -> None:
        self.request, self.folder, self.records = request, folder, records
        self.offline = offline
        self.recipe = request.recipe()
        self._clean_up = not request.is_cft
        self._evaluation_efforts: dict[bool, Effort] = {}
        self._step_efforts: dict[Any, Effort] = {}
        self._text_efforts: dict[TextFormat | None, Effort] = {}

    @cached_property
    def efforts(self) -> Efforts:
        return Efforts(self.recipe)

    def make(self, share: Share) -> list[Stage]:
        """The paper's own stages, and of the first paper's those that only the second has.

        The data come first: that they are missing is not to be found after hours of evaluation.
        """
        base = self._evaluation("base", "the base model on every set", None)
        main = self._training("train", "training", {}, share.training_steps)
        after = self._evaluation("evaluate", "the trained model on every set", "train")
        search = self._search(share)
        transfer = [
            self._transfer("transfer-base", "transfer tasks, base model", None, share),
            self._transfer("transfer-trained", "transfer tasks, trained model", "train", share),
        ]
        if not self.request.is_cft:
            with_icl = self._evaluation("evaluate-icl", "with the best demonstration", "icl-search")
            return [self._data(), base, search, with_icl, main, after, *transfer]
        assert share.ablation_steps is not None
        ablations = []
        for name, (what, changed) in self.ablations.items():
            ablations.append(self._training(name, what, changed, share.ablation_steps))
            ablations.append(self._evaluation(f"evaluate-{name}", f"{what}, on {DEV_SET}", name))
        return [self._data(), base, main, after, *ablations, search, *transfer]

    def is_own(self, stage: Stage) -> bool:
        """Whether the paper itself has it."""
        return not (self.request.is_cft and stage.kind in ("search", "transfer"))

    # -- ablations ------------------------------------------------------------------------------

    @cached_property
    def ablations(self) -> dict[str, tuple[str, dict[str, str]]]:
        """By name: what it is, and the one thing that it changes."""
        found: dict[str, tuple[str, dict[str, str]]] = {
            f"ablation-lr-{rate}": (f"learning rate {rate}", {"train.learning_rate": rate})
            for rate in LEARNING_RATES
        }
        if self.baseline not in found:
            found[self.baseline] = ("the recipe as it is", {})
        # quoted as YAML reads it: the prompt has quotes and a colon of its own
        found["ablation-prompt"] = ("with a prompt", {"text.template": json.dumps(ONE_WORD)})
        found["ablation-no-hard-negatives"] = (
            "without hard negatives",
            {"loss.hard_negatives": "none"},
        )
        return found

    @property
    def baseline(self) -> str:
        """The ablation that changes nothing, with which the others are compared."""
        for rate in LEARNING_RATES:
            if float(rate) == self.recipe.train.learning_rate:
                return f"ablation-lr-{rate}"
        return "ablation-base"

    # -- evaluation -----------------------------------------------------------------------------

    @cached_property
    def _all_sets(self) -> list[LoadedSet]:
        protocol = self.request.protocol
        return load_sets(protocol, None, offline=self.offline, cleaned_up=self._clean_up)

    @cached_property
    def _dev_set(self) -> LoadedSet:
        return load_set(DEV_SET, data_folder(), offline=self.offline, cleaned_up=self._clean_up)

    def _sets(self, of_ablation: bool) -> list[LoadedSet]:
        return [self._dev_set] if of_ablation else self._all_sets

    def _evaluation(self, name: str, what: str, of: str | None) -> Stage:
        of_ablation = of in self.ablations if self.request.is_cft else False
        adapter = None if of in (None, "icl-search") else self._adapter(str(of))

        def inputs() -> dict[str, Any]:
            return {
                **_how_embedded(self._recipe_of(of), adapter),
                "sets": {one.name: one.version for one in self._sets(of_ablation)},
                "clean_up": self._clean_up,
            }

        def work(observer: Observer) -> dict[str, Any]:
            return stage_work.evaluate_sets(
                self._recipe_of(of),
                adapter,
                self._sets(of_ablation),
                None if of_ablation else self.request.protocol,
                self.folder / "evals" / f"{name}.json",
                self._unfinished(name, inputs()),
                observer,
                cleaned_up=self._clean_up,
            )

        needs = () if of is None else (of,)
        effort = partial(self._evaluation_effort, of_ablation)
        forget = self._forget_unfinished(name)
        return Stage(name, "evaluate", what, inputs, work, needs, effort, forget)

    def _unfinished(self, name: str, inputs: dict[str, Any]) -> Unfinished:
        return Unfinished(self.folder / "unfinished" / name, inputs)

    def _forget_unfinished(self, name: str) -> Callable[[], None]:
        return partial(shutil.rmtree, self.folder / "unfinished" / name, ignore_errors=True)

    def _evaluation_effort(self, of_ablation: bool) -> Effort:
        if of_ablation not in self._evaluation_efforts:
            try:
                pairs = [pair for one in self._sets(of_ablation) for pair in one.pairs]
                texts = [text for pair in pairs for text in (pair.sentence1, pair.sentence2)]
            except ValueError:  # not at hand; doing the stage says so
                whole = sum(entry.num_pairs for entry in self.request.protocol.sets)
                num_pairs = DEV_PAIRS if of_ablation else whole
                texts = [f"{i} {_ASSUMED_TEXT}" for i in range(2 * num_pairs)]
            self._evaluation_efforts[of_ablation] = self.efforts.embed(texts)
        return self._evaluation_efforts[of_ablation]

    def _recipe_of(self, of: str | None) -> Recipe:
        """How a stage's model embeds: the demonstration or the ablation may change the text."""
        if of == "icl-search":
            template = self.records.result("icl-search")["best_template"]
            return _with(self.recipe, "text", template=template)
        changed = self.ablations[of][1] if of in self.ablations else {}
        return self.request.recipe([f"{key}={value}" for key, value in changed.items()])

    # -- training -------------------------------------------------------------------------------

    def _adapter(self, of: str) -> Path:
        return self.folder / "runs" / of / "adapter"

    def missing_data(self) -> str | None:
        """That the published training data are not here, and what to do; None if all is well."""
        paths = [section.path for section in self.recipe.data.sources]
        if PUBLISHED_DATA not in paths or Path(PUBLISHED_DATA).exists():
            return None
        return (
            f"{PUBLISHED_DATA} is not in {Path.cwd()}; download it from {PUBLISHED_DATA_URL}, or "
            "name rows of your own with `overrides` data.sources.0.path=FILE"
        )

    def _data(self) -> Stage:
        def inputs() -> dict[str, Any]:
            sources = self.recipe.data.sources
            return {
                "data": self.recipe.data.model_dump(),
                "files": {one.path: _sha256_of_file(one.path) for one in sources},
                "sets": {one.name: one.version for one in [*self._all_sets, self._dev_set]},
            }

        def work(observer: Observer) -> dict[str, Any]:
            if (missing := self.missing_data()) is not None:
                raise ValueError(missing)
            # as they are in the files: training texts are not cleaned up
            sets = load_sets(self.request.protocol, None, offline=self.offline)
            sets.append(load_set(DEV_SET, data_folder(), offline=self.offline))
            pairs = [pair for one in sets for pair in one.pairs]
            texts = {text for pair in pairs for text in (pair.sentence1, pair.sentence2)}
            found = stage_work.describe_data(self.recipe, texts, offline=self.offline)
            observer.say(f"{found['rows']:,} rows, {found['distinct_texts']:,} distinct texts")
            return {**found, "published_rows": PUBLISHED_ROWS}

        return Stage("data", "data", "what is trained on", inputs, work)

    def _training(
        self, name: str, what: str, changed: dict[str, str], steps: tuple[int, int]
    ) -> Stage:
        recipe = self._training_recipe(name, changed, steps)

        def inputs() -> dict[str, Any]:
            values = recipe.model_dump(mode="json")
            return {
                "recipe": {key: values[key] for key in values if key not in _NOT_INPUTS},
                "rows_sha256": self.records.result("data")["rows_sha256"],
            }

        def work(observer: Observer) -> dict[str, Any]:
            found = stage_work.train(recipe, observer, offline=self.offline)
            return {**found, "published_steps": steps[1]}

        def effort() -> Effort:
            key = (recipe.text, recipe.loss.hard_negatives)
            if key not in self._step_efforts:
                self._step_efforts[key] = self.efforts.step(recipe)
            steps_alone = _times(self._step_efforts[key], steps[0])
            scored = steps[0] // (recipe.eval.every or steps[0]) + 2  # before, on the way, after
            scores = _times(self._evaluation_effort(True), scored)
            return Effort(steps_alone.flops + scores.flops, steps_alone.memory_bytes)

        what = f"{what}, {steps[0]:,} steps"
        forget = partial(stage_work.put_away, self.folder / "runs" / name)
        return Stage(name, "train", what, inputs, work, ("data",), effort, forget)

    def _training_recipe(
        self, name: str, changed: dict[str, str], steps: tuple[int, int]
    ) -> Recipe:
        """The paper's recipe over so many steps, its warm-up cut alike, scored on the way."""
        ours, published = steps
        whole = self.request.whole_steps if name == "train" else published
        warmup = round(self.recipe.train.warmup_steps * ours / whole)
        points = _TRAIN_POINTS if name == "train" else _ABLATION_POINTS
        every = self.recipe.eval.every
        if every is None or ours < whole:
            every = max(1, ours // points)
        return self.request.recipe(
            [
                f"train.steps={ours}",
                "train.epochs=null",
                f"train.warmup_steps={warmup}",
                f"train.save_every={max(1, ours // _CHECKPOINTS)}",
                f"eval.sets=[{DEV_SET}]",
                f"eval.every={every}",
                f"output.folder={json.dumps(str(self.folder / 'runs'))}",
                f"output.name={name}",
                f"output.export={'adapter' if name == 'train' else 'none'}",
                *(f"{key}={value}" for key, value in changed.items()),
            ]
        )

    # -- the second paper's ---------------------------------------------------------------------

    @cached_property
    def _demonstrations(self) -> list[Demonstration]:
        given = self.request.demonstrations
        return read_demonstrations(SHIPPED if given is None else Path(given))

    @cached_property
    def _prompteol_recipe(self) -> Recipe:
        """How the second paper embeds with this model."""
        if not self.request.is_cft:
            return self.recipe
        like = load_recipe("prompteol-smollm2-135m")  # all of them have the same text section
        return self.recipe.model_copy(update={"text": like.text, "embedding": like.embedding})

    def _search(self, share: Share) -> Stage:
        """On the base model under the PromptEOL template, whichever paper the run is of."""
        recipe, num_pairs = self._prompteol_recipe, share.icl_pairs[0]

        def scored_set() -> LoadedSet:
            whole = load_set(DEV_SET, data_folder(), offline=self.offline, cleaned_up=True)
            return sampled(whole, num_pairs)

        def inputs() -> dict[str, Any]:
            listed = [f"{one.sentence} -> {one.word}" for one in self._demonstrations]
            return {
                **_how_embedded(recipe, None),
                **icl.set_identity(scored_set()),
                "demonstrations_sha256": digest({"listed": listed}),
            }

        def work(observer: Observer) -> dict[str, Any]:
            return stage_work.search_demonstration(
                recipe, scored_set(), self._demonstrations, self.folder / "icl", observer
            )

        tries = len(self._demonstrations)

        def effort() -> Effort:
            text = recipe.text
            shown = self._demonstrations[0].before(text.template)
            text_format = TextFormat(shown, text.append_eos, text.max_tokens)
            return self._per_text(2 * num_pairs * (1 + tries), text_format)

        what = f"{tries} demonstrations on {num_pairs:,} pairs of {DEV_SET}"
        forget = partial(stage_work.put_away, self.folder / "icl")
        return Stage("icl-search", "search", what, inputs, work, (), effort, forget)

    def _transfer(self, name: str, what: str, of: str | None, share: Share) -> Stage:
        limit = share.transfer_rows_per_split
        adapter = None if of is None else self._adapter(of)

        def tasks() -> list[TransferTask]:
            return load_tasks(data_folder(), list(SPECS), limit=limit)

        def inputs() -> dict[str, Any]:
            sums: dict[str, str] = {}
            for task in tasks():
                sums |= task.checksums
            return {**_how_embedded(self.recipe, adapter), "files": sums, "rows_per_split": limit}

        def work(observer: Observer) -> dict[str, Any]:
            return stage_work.score_transfer(
                self.recipe,
                adapter,
                tasks,
                self._unfinished(name, inputs()),
                observer,
                cleaned_up=self._clean_up,
            )

        rows = sum(
            min(size, limit or size) * (2 if spec.pairs else 1)
            for spec in SPECS.values()
            for size in spec.splits.values()
        )
        needs = () if of is None else (of,)
        forget = self._forget_unfinished(name)
        effort = partial(self._per_text, rows)
        return Stage(name, "transfer", what, inputs, work, needs, effort, forget)

    def _per_text(self, texts: int, text_format: TextFormat | None = None) -> Effort:
        if text_format not in self._text_efforts:
            self._text_efforts[text_format] = self.efforts.embed([_ASSUMED_TEXT], text_format)
        return _times(self._text_efforts[text_format], texts)


def _sha256_of_file(path: str) -> str | None:
    """None for what is no file here: a folder, a data set on the hub."""
    return sha256_of(Path(path)) if Path(path).is_file() else None


def _times(effort: Effort, times: int) -> Effort:
    """So often one after the other."""
    return Effort(effort.flops * times, effort.memory_bytes)


def _with(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def _how_embedded(recipe: Recipe, adapter: Path | None) -> dict[str, Any]:
    """What an embedding depends on."""
    found: dict[str, Any] = {
        name: getattr(recipe, name).model_dump() for name in ("model", "text", "embedding")
    }
    if adapter is not None:
        weights = adapter / "adapter_model.safetensors"
        found["adapter_sha256"] = sha256_of(weights) if weights.is_file() else None
    return found
