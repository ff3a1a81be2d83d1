"""The stages of a paper's run: what each depends on, what it does, what it costs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lowmem_cft.data.tokens import query_format
from lowmem_cft.evaluation.search import search as icl
from lowmem_cft.evaluation.search.demonstrations import SHIPPED, Demonstration, read_demonstrations
from lowmem_cft.evaluation.sts.sets import LoadedSet, data_folder, load_set, load_sets, sampled
from lowmem_cft.evaluation.transfer.tasks import SPECS, TransferTask, load_tasks
from lowmem_cft.files import digest, sha256_of
from lowmem_cft.papers import names
from lowmem_cft.papers import work as stage_work
from lowmem_cft.papers.effort import Efforts
from lowmem_cft.papers.paper import Ablation, Share
from lowmem_cft.papers.records import Records
from lowmem_cft.papers.request import Request
from lowmem_cft.papers.results import Data, Evaluation, Search, Training, Transfer
from lowmem_cft.papers.stages import Effort, Observer, Stage
from lowmem_cft.papers.work import Unfinished
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.recipe.schema import Recipe

# how often a cut training run is scored on its way, and how often any is saved
_TRAIN_POINTS, _ABLATION_POINTS = 10, 2
_CHECKPOINTS = 20
# for estimates, where the sentences are not at hand
_ASSUMED_TEXT = "word " * 12
# sections of a recipe that change nothing in what is trained, and the data, a stage of its own
_NOT_INPUTS = ("memory", "output", "eval", "data")


class PaperStages:
    """Makes a request's stages; their results lie in the folder."""

    def __init__(self, request: Request, folder: Path, records: Records, *, offline: bool) -> None:
        self.request, self.folder, self.records = request, folder, records
        self.offline = offline
        self.paper = request.of_paper
        self.recipe = request.recipe()
        self._clean_up = self.paper.clean_up

    @cached_property
    def efforts(self) -> Efforts:
        return Efforts(self.recipe)

    def make(self, share: Share) -> list[Stage]:
        """The paper's stages and, after them, those beyond it."""
        limit = share.transfer_rows_per_split
        base, trained, of = "base model", "trained model", names.TRAIN
        scored = partial(self._evaluation, recipe=lambda: self.recipe)
        make: dict[str, Callable[[str], Stage]] = {
            names.DATA: self._data,
            names.BASE: partial(scored, what=f"the {base} on every set"),
            names.SEARCH: partial(self._search, num_pairs=share.icl_pairs[0]),
            names.WITH_DEMONSTRATION: partial(
                self._evaluation,
                what="with the best demonstration",
                recipe=self._recipe_with_demonstration,
                needs=(names.SEARCH,),
            ),
            names.TRAIN: partial(self._training, what="training", steps=share.training_steps),
            names.EVALUATE: partial(scored, what=f"the {trained} on every set", of=of),
            names.TRANSFER_BASE: partial(
                self._transfer, what=f"transfer tasks, {base}", limit=limit
            ),
            names.TRANSFER_TRAINED: partial(
                self._transfer, what=f"transfer tasks, {trained}", limit=limit, of=of
            ),
        }
        stages = [make[name](name) for name in self.paper.stages]
        if share.ablation_steps is not None:
            for ablation in self.ablations:
                stages += self._ablation(ablation, share.ablation_steps)
        return stages + [make[name](name) for name in self.paper.beyond]

    def is_own(self, stage: Stage) -> bool:
        """Whether the paper itself has it."""
        return stage.name not in self.paper.beyond

    # -- ablations ------------------------------------------------------------------------------

    @cached_property
    def baseline(self) -> str | None:
        """The ablation that changes nothing, with which the others are compared."""
        for ablation in self.paper.ablations:
            if self.request.recipe(ablation.assignments) == self.recipe:
                return ablation.name
        return None

    @property
    def ablations(self) -> list[Ablation]:
        """The recipe as it is counts as one only where it is the baseline."""
        return [
            ablation
            for ablation in self.paper.ablations
            if ablation.value is not None or ablation.name == self.baseline
        ]

    def _ablation(self, ablation: Ablation, steps: tuple[int, int]) -> list[Stage]:
        name, changed = ablation.name, ablation.assignments
        evaluation = self._evaluation(
            names.evaluation_of(name),
            f"{ablation.what}, on {names.DEV_SET}",
            partial(self.request.recipe, changed),
            of=name,
            on_dev_set=True,
        )
        return [self._training(name, ablation.what, steps, changed), evaluation]

    # -- evaluation -----------------------------------------------------------------------------

    @cached_property
    def _all_sets(self) -> list[LoadedSet]:
        protocol = self.request.protocol
        return load_sets(protocol, None, offline=self.offline, cleaned_up=self._clean_up)

    @cached_property
    def _dev_set(self) -> LoadedSet:
        return load_set(
            names.DEV_SET, data_folder(), offline=self.offline, cleaned_up=self._clean_up
        )

    def _sets(self, on_dev_set: bool) -> list[LoadedSet]:
        return [self._dev_set] if on_dev_set else self._all_sets

    def _recipe_with_demonstration(self) -> Recipe:
        """How texts are embedded under the template that the search found."""
        template = self.records.result(names.SEARCH, Search).best_template
        return self.recipe.with_values("text", template=template)

    def _evaluation(
        self,
        name: str,
        what: str,
        recipe: Callable[[], Recipe],
        *,
        of: str | None = None,
        needs: tuple[str, ...] = (),
        on_dev_set: bool = False,
    ) -> Stage:
        """Score the base model, or the one that the stage `of` trained."""
        adapter = None if of is None else self._adapter(of)

        def inputs() -> dict[str, Any]:
            return {
                **_how_embedded(recipe(), adapter),
                "sets": {loaded.name: loaded.version for loaded in self._sets(on_dev_set)},
                "clean_up": self._clean_up,
            }

        def work(observer: Observer) -> Evaluation:
            return stage_work.evaluate_sets(
                recipe(),
                adapter,
                self._sets(on_dev_set),
                None if on_dev_set else self.request.protocol,
                self.folder / "evals" / f"{name}.json",
                self._unfinished(name, inputs()),
                observer,
                cleaned_up=self._clean_up,
            )

        needs = needs if of is None else (of,)
        forget = self._forget_unfinished(name)

        def effort() -> Effort:
            return self._effort_of_dev_set if on_dev_set else self._effort_of_all_sets

        return Stage(name, "evaluate", what, inputs, work, needs, effort, forget)

    def _unfinished(self, name: str, inputs: dict[str, Any]) -> Unfinished:
        return Unfinished(self.folder / "unfinished" / name, inputs)

    def _forget_unfinished(self, name: str) -> Callable[[], None]:
        return partial(shutil.rmtree, self.folder / "unfinished" / name, ignore_errors=True)

    @cached_property
    def _effort_of_all_sets(self) -> Effort:
        num_pairs = sum(entry.num_pairs for entry in self.request.protocol.sets)
        return self._effort_of(lambda: self._all_sets, num_pairs)

    @cached_property
    def _effort_of_dev_set(self) -> Effort:
        return self._effort_of(lambda: [self._dev_set], names.DEV_PAIRS)

    def _effort_of(self, load: Callable[[], list[LoadedSet]], num_pairs: int) -> Effort:
        try:
            texts = _texts(load())
        except ValueError:  # not at hand; doing the stage says so
            texts = [f"{i} {_ASSUMED_TEXT}" for i in range(2 * num_pairs)]
        return self.efforts.embed(texts)

    # -- training -------------------------------------------------------------------------------

    def _adapter(self, of: str) -> Path:
        return self.folder / "runs" / of / "adapter"

    def missing_data(self) -> str | None:
        """That the published training data are not here, and what to do; None if all is well."""
        data = self.paper.data
        paths = [section.path for section in self.recipe.data.sources]
        if data.name not in paths or Path(data.name).exists():
            return None
        return (
            f"{data.name} is not in {Path.cwd()}; download it from {data.url}, or "
            "name rows of your own with `overrides` data.sources.0.path=FILE"
        )

    def _data(self, name: str) -> Stage:
        def inputs() -> dict[str, Any]:
            paths = [section.path for section in self.recipe.data.sources]
            sets = [*self._all_sets, self._dev_set]
            return {
                "data": self.recipe.data.model_dump(),
                "files": {path: _sha256_of_file(path) for path in paths},
                "sets": {loaded.name: loaded.version for loaded in sets},
            }

        def work(observer: Observer) -> Data:
            if (missing := self.missing_data()) is not None:
                raise ValueError(missing)
            # as they are in the files: training texts are not cleaned up
            sets = load_sets(self.request.protocol, None, offline=self.offline)
            sets.append(load_set(names.DEV_SET, data_folder(), offline=self.offline))
            texts, rows = set(_texts(sets)), self.paper.data.rows
            data = stage_work.describe_data(self.recipe, texts, rows, offline=self.offline)
            observer.say(f"{data.rows:,} rows, {data.distinct_texts:,} distinct texts")
            return data

        return Stage(name, "data", "what is trained on", inputs, work)

    def _training(
        self, name: str, what: str, steps: tuple[int, int], changed: Sequence[str] = ()
    ) -> Stage:
        recipe = self._training_recipe(name, steps, changed)

        def inputs() -> dict[str, Any]:
            values = _values(recipe)
            return {
                "recipe": {key: values[key] for key in values if key not in _NOT_INPUTS},
                "rows_sha256": self.records.result(names.DATA, Data).rows_sha256,
            }

        def work(observer: Observer) -> Training:
            return stage_work.train(recipe, steps[1], observer, offline=self.offline)

        def effort() -> Effort:
            steps_alone = self.efforts.step(recipe).times(steps[0])
            scored = steps[0] // (recipe.eval.every or steps[0]) + 2  # before, on the way, after
            scores = self._effort_of_dev_set.times(scored)
            return Effort(steps_alone.flops + scores.flops, steps_alone.memory_bytes)

        what = f"{what}, {steps[0]:,} steps"
        forget = partial(stage_work.put_away, self.folder / "runs" / name)
        return Stage(name, "train", what, inputs, work, (names.DATA,), effort, forget)

    def _training_recipe(self, name: str, steps: tuple[int, int], changed: Sequence[str]) -> Recipe:
        """The paper's recipe over so many steps, its warm-up cut alike, scored on the way."""
        ours, published = steps
        whole = self.request.whole_steps if name == names.TRAIN else published
        warmup = round(self.recipe.train.warmup_steps * ours / whole)
        points = _TRAIN_POINTS if name == names.TRAIN else _ABLATION_POINTS
        every = self.recipe.eval.every
        if every is None or ours < whole:
            every = max(1, ours // points)
        exported = name == names.TRAIN and not self.recipe.text.joins_tail
        return self.request.recipe(
            [
                f"train.steps={ours}",
                "train.epochs=null",
                f"train.warmup_steps={warmup}",
                f"train.save_every={max(1, ours // _CHECKPOINTS)}",
                f"eval.sets=[{names.DEV_SET}]",
                f"eval.every={every}",
                f"output.folder={json.dumps(str(self.folder / 'runs'))}",
                f"output.name={name}",
                f"output.export={'adapter' if exported else 'none'}",
                *changed,
            ]
        )

    # -- demonstrations -------------------------------------------------------------------------

    @cached_property
    def _demonstrations(self) -> list[Demonstration]:
        given = self.request.demonstrations
        return read_demonstrations(SHIPPED if given is None else Path(given))

    @cached_property
    def _search_recipe(self) -> Recipe:
        """How texts are embedded in the search: as the run does, or as the paper's recipe for it."""
        if self.paper.search_recipe is None:
            return self.recipe
        like = load_recipe(self.paper.search_recipe)
        return self.recipe.model_copy(update={"text": like.text, "embedding": like.embedding})

    def _search(self, name: str, num_pairs: int) -> Stage:
        """Search on the base model."""
        recipe = self._search_recipe

        def scored_set() -> LoadedSet:
            whole = load_set(names.DEV_SET, data_folder(), offline=self.offline, cleaned_up=True)
            return sampled(whole, num_pairs)

        def inputs() -> dict[str, Any]:
            listed = [f"{shown.sentence} -> {shown.word}" for shown in self._demonstrations]
            return {
                **_how_embedded(recipe, None),
                **icl.set_identity(scored_set()),
                "demonstrations_sha256": digest({"listed": listed}),
            }

        def work(observer: Observer) -> Search:
            return stage_work.search_demonstration(
                recipe, scored_set(), self._demonstrations, self.folder / "icl", observer
            )

        tries = len(self._demonstrations)

        def effort() -> Effort:
            shown = self._demonstrations[0].before(recipe.text.template)
            text_format = replace(query_format(recipe), template=shown)
            return self.efforts.embed([_ASSUMED_TEXT], text_format).times(
                2 * num_pairs * (1 + tries)
            )

        what = f"{tries} demonstrations on {num_pairs:,} pairs of {names.DEV_SET}"
        forget = partial(stage_work.put_away, self.folder / "icl")
        return Stage(name, "search", what, inputs, work, (), effort, forget)

    # -- transfer tasks -------------------------------------------------------------------------

    def _transfer(self, name: str, what: str, limit: int | None, of: str | None = None) -> Stage:
        """Score the base model, or the one that a stage trained, on at most so many rows a split."""
        adapter = None if of is None else self._adapter(of)

        def tasks() -> list[TransferTask]:
            return load_tasks(data_folder(), list(SPECS), limit=limit)

        def inputs() -> dict[str, Any]:
            checksums: dict[str, str] = {}
            for task in tasks():
                checksums |= task.checksums
            return {
                **_how_embedded(self.recipe, adapter),
                "files": checksums,
                "rows_per_split": limit,
            }

        def work(observer: Observer) -> Transfer:
            return stage_work.score_transfer(
                self.recipe,
                adapter,
                tasks,
                self._unfinished(name, inputs()),
                observer,
                cleaned_up=self._clean_up,
            )

        def effort() -> Effort:
            num_texts = sum(
                min(size, limit or size) * (2 if spec.pairs else 1)
                for spec in SPECS.values()
                for size in spec.splits.values()
            )
            return self.efforts.embed([_ASSUMED_TEXT]).times(num_texts)

        needs = () if of is None else (of,)
        forget = self._forget_unfinished(name)
        return Stage(name, "transfer", what, inputs, work, needs, effort, forget)


def _texts(sets: Sequence[LoadedSet]) -> list[str]:
    """Every sentence of every pair."""
    pairs = [pair for loaded in sets for pair in loaded.pairs]
    return [text for pair in pairs for text in (pair.sentence1, pair.sentence2)]


def _sha256_of_file(path: str) -> str | None:
    """None for what is no file here: a folder, a data set on the hub."""
    return sha256_of(Path(path)) if Path(path).is_file() else None


def _values(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values as a record's inputs, which are those that older versions wrote."""
    values = recipe.model_dump(mode="json")
    del values["train"]["save_minutes"], values["loss"]["on_no_negatives"]  # change no result
    if recipe.text.joins_tail or not recipe.text.has_tail:
        del values["text"]["tail"]  # there was no other way
    return values


def _how_embedded(recipe: Recipe, adapter: Path | None) -> dict[str, Any]:
    """What an embedding depends on."""
    values = {name: _values(recipe)[name] for name in ("model", "text", "embedding")}
    if adapter is not None:
        weights = adapter / "adapter_model.safetensors"
        values["adapter_sha256"] = sha256_of(weights) if weights.is_file() else None
    return values
