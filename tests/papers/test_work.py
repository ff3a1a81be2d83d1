"""What stages do: go on where they stopped, and read what they should."""

from __future__ import annotations

from typing import Any

import pytest

from lowmem_cft.inference import loading
from lowmem_cft.papers import work as stage_work
from lowmem_cft.training.interrupt import Interrupted
from reproducing import Ask, records_of, stop
from running import Heard


def test_transfer_reads_raw_embeddings(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ask(stages=["transfer-base"])
    normalized: list[bool] = []

    def loads(recipe: Any, *arguments: Any) -> Any:
        normalized.append(recipe.embedding.normalize)
        return load(recipe, *arguments)

    load = stage_work.load_by_recipe
    monkeypatch.setattr(stage_work, "load_by_recipe", loads)
    run.run(Heard())
    assert normalized == [False]


def test_a_stopped_training_goes_on(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(stages=["data"]).run(Heard())
    with monkeypatch.context() as stopped:
        stopped.setattr(Heard, "step", lambda self, line: line.step == 2 and stop())
        with pytest.raises(Interrupted, match=r"stopped in training \(train\); "):
            ask(stages=["train"]).run(Heard())
    heard = Heard()
    ask(stages=["train"]).run(heard)
    assert any("going on after step" in text for text in heard.said)
    once = ask(folder="once", stages=["data", "train"])
    once.run(Heard())
    losses = [records_of(run)["train"]["result"]["losses"] for run in (ask(), once)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("stage", "last"), [("base", "STS13"), ("transfer-base", "SST2")])
def test_a_stopped_evaluation_goes_on(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, stage: str, last: str
) -> None:
    """What was embedded is not embedded again, unless it would be embedded otherwise now."""
    embedded: list[int] = []

    def counts(encoder: Any, tokenizer: Any, texts: Any, *arguments: Any, **options: Any) -> Any:
        embedded.append(len(texts))
        return embed(encoder, tokenizer, texts, *arguments, **options)

    embed = loading.embed_texts
    monkeypatch.setattr(loading, "embed_texts", counts)

    def stop_before_the_end(**asked: Any) -> None:
        with monkeypatch.context() as stopped:
            at_last = lambda self, text: text.startswith(last) and stop()
            stopped.setattr(Heard, "say", at_last)
            with pytest.raises(KeyboardInterrupt):
                ask(stages=[stage], **asked).run(Heard())

    once = ask(folder="once", stages=[stage])
    once.run(Heard())
    whole = embedded.copy()
    embedded.clear()
    stop_before_the_end()
    before = embedded.copy()
    assert len(before) > 0
    assert list((ask().folder / "unfinished" / stage).glob("*.npy"))
    ask(stages=[stage]).run(Heard())
    assert embedded == whole
    assert not (ask().folder / "unfinished" / stage).exists()
    results = [records_of(run)[stage]["result"] for run in (ask(), once)]
    assert results[0] == results[1]

    embedded.clear()
    stop_before_the_end(folder="other")
    request = ask(folder="other").folder / "reproduction.json"
    request.unlink()  # begun anew with another text around
    ask(folder="other", stages=[stage], overrides=("text.template='so {text}'",)).run(Heard())
    assert embedded == before + whole


def test_overlap_with_evaluation_is_of_texts_as_they_are(ask: Ask) -> None:
    """Clean-up adds a full stop, and would hide that a training text is scored on."""
    counts = []
    for paper in ("cft", "prompteol"):
        run = ask(paper, folder=paper, stages=["data"])
        run.run(Heard())
        counts.append(records_of(run)["data"]["result"]["texts_in_evaluation"])
    assert counts[0] == counts[1] > 0
