"""An export that embeds otherwise is found out, and only such a one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem_cft.data.tokens import TextFormat
from lowmem_cft.exporting.check import NUM_CHECKED, fitting_texts
from lowmem_cft.training import pipeline
from running import MakeRecipe, Silent
from tiny import tiny_tokenizer


def test_export_check_fails_loudly(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layout that reads another token must not pass."""
    from lowmem_cft.exporting import layout as export

    monkeypatch.setitem(export._POOLING_KEYS, "eos", "pooling_mode_mean_tokens")
    with pytest.raises(RuntimeError, match=r"does not embed as the trained one: lowest cosine"):
        pipeline.run_recipe(make_recipe(), Silent())
    assert (Path(make_recipe().output.folder) / "tiny" / "adapter").is_dir()


def test_long_texts_do_not_fail_the_check_of_a_template_with_a_tail(
    make_recipe: MakeRecipe,
) -> None:
    made = make_recipe(
        text={"template": "the man is {text} in two", "append_eos": False, "max_tokens": 5},
        embedding={"pooling": "last"},
    )
    _, metrics = pipeline.run_recipe(made, Silent())
    assert metrics.export.checked is True


def test_texts_that_would_be_cut_are_not_compared() -> None:
    text_format = TextFormat("the man is {text} in two", append_eos=False, max_tokens=3)
    texts = ["the cat sat", "the cat sat on", "", "sad", "the big red house"]
    fitting = fitting_texts(tiny_tokenizer(), texts, text_format)
    assert fitting == ["the cat sat", "", "sad"]
    assert fitting_texts(tiny_tokenizer(), [], text_format) == []
    many = fitting_texts(tiny_tokenizer(), ["sad"] * 100, text_format)
    assert len(many) == NUM_CHECKED
