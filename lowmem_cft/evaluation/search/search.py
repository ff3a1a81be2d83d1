"""Which demonstration helps most: each is scored on a set of pairs, every score is kept at once.

The way of the PromptEOL paper (arXiv 2307.16645): one demonstration a model, the best of a list on
STS-B dev.

P: pairs, B: bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lowmem_cft.evaluation.search.demonstrations import PROMPTEOL, Demonstration, check_template
from lowmem_cft.evaluation.search.trials import Trial, TrialFile, read_plain, save_plain
from lowmem_cft.evaluation.sts.bootstrap import interval, resampled_spearman
from lowmem_cft.evaluation.sts.correlation import Floats, spearman
from lowmem_cft.evaluation.sts.score import score_pairs
from lowmem_cft.evaluation.sts.sets import LoadedSet, pairs_sha256
from lowmem_cft.inference.embed import Embed
from lowmem_cft.inference.embedder import is_sentence_transformer
from lowmem_cft.inference.loading import Embedder, load_model, says_how_it_embeds
from lowmem_cft.machine import dtype_name
from lowmem_cft.model.identity import lora_scaling, weights_digest
from lowmem_cft.progress import Counts
from lowmem_cft.recipe.schema import TEXT_SLOT

EmbedUnder = Callable[[str], Embed]
"""A template to what embeds texts under it."""

_READ = {"embedding.pooling": "last", "text.append_eos": "false", "text.tail": "joined"}
"""How PromptEOL reads a base model: at the template's last token."""


@dataclass(frozen=True)
class SearchedModel:
    """A model and the template without a demonstration."""

    name: str
    loaded: Embedder
    template: str

    def embed_under(self, say: Callable[[str], None]) -> EmbedUnder:
        """Texts are embedded as the model's recipe says, but for the template.

        Only the first note on the model is said: it is the same under every template.
        """
        loaded = self.loaded
        said: list[str] = []

        def say_once(note: str) -> None:
            if not said:
                say(note)
            said.append(note)

        def under(template: str) -> Embed:
            text_format = replace(loaded.text_format, template=template)
            return partial(loaded.embed, text_format=text_format, say=say_once)

        return under

    def identity(self) -> dict[str, Any]:
        """All of the model that scores depend on."""
        recipe = self.loaded.recipe
        return {
            "model": self.name,
            "weights": weights_digest(self.loaded.encoder.model),
            "lora_scaling": lora_scaling(self.loaded.encoder.model),
            "quantization": recipe.model.quantization,
            "dtype": dtype_name(self.loaded.backbone.dtype),
            "pooling": recipe.embedding.pooling,
            "append_eos": recipe.text.append_eos,
            "max_tokens": recipe.text.max_tokens,
            # joined was the only way once, and is not told
            **({} if recipe.text.tail == "joined" else {"tail": recipe.text.tail}),
        }

    def as_recipe(self, template: str) -> str:
        """YAML for a recipe that embeds under the template as the search did: a part of one."""
        recipe = self.loaded.recipe
        values = {
            "text": {
                "template": template,
                "tail": recipe.text.tail,
                "append_eos": recipe.text.append_eos,
                "max_tokens": recipe.text.max_tokens,
            },
            "embedding": {"pooling": recipe.embedding.pooling},
            "model": recipe.model.model_dump(mode="json", exclude_defaults=True),
            **({"output": {"export": "none"}} if recipe.text.joins_tail else {}),
        }
        text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10**6)
        return text

    def advice(self, template: str) -> str:
        """What `as_recipe` is good for: a run or an export is evaluated by its own recipe alone."""
        if not says_how_it_embeds(Path(self.name).expanduser()):
            return (
                "Lines of a recipe; with a data section it is one to train, and one for "
                f"`lowmem-cft eval {self.name} --recipe RECIPE`:"
            )
        if template == self.loaded.recipe.text.template:
            return f"{self.name} embeds so as it is:"
        return (
            f"{self.name} is always evaluated under the template it was trained with. To use this "
            "one, train a recipe with these lines:"
        )

    def search(
        self,
        scored_set: LoadedSet,
        demonstrations: Sequence[Demonstration],
        folder: Path,
        observer: Counts,
    ) -> SearchResult:
        """Score the template without and with each demonstration; see the function `search`."""
        trials = search(
            self.embed_under(observer.say),
            scored_set,
            self.template,
            demonstrations,
            folder,
            self.identity() | set_identity(scored_set),
            observer,
        )
        return SearchResult(self, trials)


@dataclass(frozen=True)
class SearchResult:
    """What a search has scored: at least the template without a demonstration, the best first."""

    model: SearchedModel
    trials: list[Trial]

    @property
    def best(self) -> Trial:
        return self.trials[0]

    @property
    def template(self) -> str:
        """The template that embeds best."""
        return self.best.template(self.model.template)

    @property
    def recipe(self) -> str:
        """The part of a recipe, as YAML, that embeds so."""
        return self.model.as_recipe(self.template)


def load_searched(
    name: str,
    template: str | None,
    device: torch.device,
    say: Callable[[str], None],
    *,
    recipe_name: str | None = None,
    overrides: Sequence[str] = (),
) -> SearchedModel:
    """Load a run's folder or a base model for a search.

    Args:
        template: the one that demonstrations are put before; without it the model's recipe's if
            that goes on after the text, else PromptEOL's.

    Raises:
        ValueError: nothing of that name, a template without its slot, a recipe or assignments for a
            run or an export, or a sentence-transformers model.
    """
    if template is not None:
        check_template(template)
    if is_sentence_transformer(name, say):
        raise ValueError(
            f"{name} is a sentence-transformers model, whose modules say how it embeds, so no "
            "demonstration can be tried on it; give a base model, or a run's folder"
        )
    if recipe_name is None and not says_how_it_embeds(Path(name).expanduser()):
        overrides = [*(f"{key}={value}" for key, value in _READ.items()), *overrides]
    loaded = load_model(name, device, say, recipe_name=recipe_name, overrides=overrides)
    if template is None:
        own = loaded.recipe.text.template
        template = PROMPTEOL if own.endswith(TEXT_SLOT) else own
    return SearchedModel(name, loaded, template)


def set_identity(scored_set: LoadedSet) -> dict[str, Any]:
    """All of the set that scores depend on."""
    pairs = scored_set.pairs
    return {"set": scored_set.name, "pairs": len(pairs), "sha256": pairs_sha256(pairs)[:16]}


def search(
    embed_under: EmbedUnder,
    scored_set: LoadedSet,
    template: str,
    demonstrations: Sequence[Demonstration],
    folder: Path,
    identity: Mapping[str, Any],
    observer: Counts,
) -> list[Trial]:
    """Score the template without and with each demonstration; those in the folder are not redone.

    Args:
        folder: holds `trials.jsonl` and `plain.npy`, the cosines without a demonstration.
        identity: what else the scores depend on, as JSON values.

    Returns:
        The trials, best first; of equal ones the earlier. One is without a demonstration.

    Raises:
        ValueError: the folder is of another search, or the set cannot be scored.
    """
    file = TrialFile(folder, {"template": template, **identity})
    candidates: list[Demonstration | None] = [None, *demonstrations]
    plain = folder / "plain.npy"
    gold_P = np.array([pair.score for pair in scored_set.pairs], dtype=np.float64)
    plain_P = np.empty(0)
    done = set(file.trials)
    if None in done:
        try:
            plain_P = read_plain(plain, file.trials[None], gold_P)
        except ValueError as reason:
            observer.say(f"{plain}: {reason}; the plain template is scored again")
            done.remove(None)
    left = [candidate for candidate in candidates if candidate not in done]
    num_done = len(candidates) - len(left)
    if num_done:
        observer.say(f"{num_done} of {len(candidates)} are in {file.path}")
    observer.begin(len(candidates), num_done, what="demonstrations")
    for place, candidate in enumerate(left, num_done + 1):
        under = template if candidate is None else candidate.before(template)
        scored = score_pairs(embed_under(under), scored_set)
        if candidate is None:
            plain_P = scored.cosine_P
            save_plain(plain, plain_P)
        trial = _trial(candidate, scored_set.name, scored.gold_P, plain_P, scored.cosine_P)
        file.add(trial)
        observer.advance(1)
        observer.say(f"{place}/{len(candidates)}  {trial.describe()}")
    trials = [file.trials[candidate] for candidate in candidates]
    return sorted(trials, key=lambda trial: -trial.spearman)


def _trial(
    candidate: Demonstration | None, name: str, gold_P: Floats, plain_P: Floats, cosine_P: Floats
) -> Trial:
    score = spearman(cosine_P, gold_P)
    if candidate is None:
        own = interval(resampled_spearman(name, gold_P, [cosine_P])[0])
        return Trial(None, None, score, own.low, own.high)
    plain_B, own_B = resampled_spearman(name, gold_P, [plain_P, cosine_P])
    own, gain = interval(own_B), interval(own_B - plain_B)
    above = score - spearman(plain_P, gold_P)
    return Trial(
        candidate.sentence, candidate.word, score, own.low, own.high, above, gain.low, gain.high
    )
