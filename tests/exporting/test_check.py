"""An export that embeds otherwise is found out, and only such a one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem_cft.data.tokens import TextFormat
from lowmem_cft.exporting.check import awkward_texts
from lowmem_cft.training import pipeline
from running import MakeRecipe, Silent
from tiny import tiny_tokenizer


def test_export_check_fails_loudly(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layout that reads another token must not pass."""
    from lowmem_cft.exporting import layout as export

    monkeypatch.setitem(export._POOLING_KEYS, "eos", "pooling_mode_mean_tokens")
    observer = Silent()
    with pytest.raises(
        RuntimeError, match=r"does not embed as the trained one: of \d+ texts the text"
    ):
        pipeline.run_recipe(make_recipe(), observer)
    assert not observer.lines, "it was found before the training"
    assert not (Path(make_recipe().output.folder) / "tiny").exists()


def test_awkward_texts_are_what_they_are_for() -> None:
    tokenizer = tiny_tokenizer()
    text_format = TextFormat("the man is {text} in two", append_eos=False, max_tokens=3)
    texts = awkward_texts(tokenizer, text_format, 64)
    assert "" in texts
    assert "</s>" in texts
    assert any(len(tokenizer(text)["input_ids"]) > 3 for text in texts)
    bare = TextFormat("{text}", append_eos=False, max_tokens=3)
    assert "" not in awkward_texts(tokenizer, bare, 64), "nothing of it could be embedded"
    assert "</s>" not in awkward_texts(tokenizer, text_format, 2), "it has no embedding"


def test_the_check_says_what_it_compared(make_recipe: MakeRecipe) -> None:
    observer = Silent()
    made = make_recipe(
        text={"template": "the man is {text} in two", "append_eos": False, "max_tokens": 5},
        embedding={"pooling": "last"},
    )
    _, metrics = pipeline.run_recipe(made, observer)
    assert metrics.export.checked is True
    said = [line for line in observer.said if line.startswith("export checked: 24 texts and ")]
    assert len(said) == 2, "before the training and after it"
