"""What is asked for of a paper."""

from __future__ import annotations

from lowmem_cft.papers.request import PAPERS, Request


def test_models_are_those_of_the_recipes() -> None:
    assert set(PAPERS["cft"].recipes) == {"minicpm-2b", "phi-2", "gemma-2b", "smollm2-135m"}
    assert {"opt-125m", "opt-13b", "llama-7b", "smollm2-135m"} <= set(PAPERS["prompteol"].recipes)


def test_length_is_counted_by_the_papers_recipe_not_by_the_users() -> None:
    for paper, model, steps in (
        ("cft", "minicpm-2b", 4_594),
        ("prompteol", "opt-1.3b", 1_077),
        ("prompteol", "llama-13b", 1_379),
    ):
        assert Request(paper, model).published_steps == steps
    shorter = Request("cft", "minicpm-2b", overrides=("train.steps=100",))
    assert (shorter.whole_steps, shorter.published_steps) == (100, 4_594)
    larger = Request("cft", "minicpm-2b", overrides=("train.logical_batch=600",))
    assert (larger.whole_steps, larger.published_steps) == (460, 4_594)
