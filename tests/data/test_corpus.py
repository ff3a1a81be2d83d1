"""Rows become tokens, each distinct text once, and the table points at the right ones."""

from __future__ import annotations

from pathlib import Path

from lowmem_cft.data.batches import NO_TEXT
from lowmem_cft.data.corpus import Corpus, build_corpus, read_sources
from lowmem_cft.data.rows import TrainRow
from lowmem_cft.data.tokens import document_format, query_format
from lowmem_cft.recipe.schema import DataSection, DataSource, Recipe, TextSection
from tiny import tiny_tokenizer

SOURCES = [
    [
        TrainRow("the cat", "a dog", ("big house", "small house")),
        TrainRow("a dog", "the cat", ()),
        TrainRow("red river", "a dog", ("the cat",)),
    ],
    [
        TrainRow("big house", "blue road", ("red river", "a dog")),
        TrainRow("rain", "rain", ("sun",)),
    ],
]

EVERY_ROW = [row for source in SOURCES for row in source]


def recipe_of(template: str, document_template: str | None = None, max_tokens: int = 8) -> Recipe:
    return Recipe(
        data=DataSection(sources=[DataSource(path="demo")]),
        text=TextSection(
            template=template, document_template=document_template, max_tokens=max_tokens
        ),
    )


def decoded(corpus: Corpus, index: int) -> str:
    return str(tiny_tokenizer().decode(corpus.store[int(index)]))


def assert_rows_hold(corpus: Corpus, query: str, document: str) -> None:
    """Every row's tokens decode to its texts in the templates."""
    table = corpus.table
    assert len(table) == len(EVERY_ROW)
    assert table.negative_NK.shape == (5, 2)
    for i, row in enumerate(EVERY_ROW):
        assert decoded(corpus, table.anchor_N[i]) == f"{query.format(text=row.anchor)} </s>"
        assert decoded(corpus, table.positive_N[i]) == f"{document.format(text=row.positive)} </s>"
        there = [n for n in table.negative_NK[i].tolist() if n != NO_TEXT]
        assert [decoded(corpus, n) for n in there] == [
            f"{document.format(text=negative)} </s>" for negative in row.negatives
        ]
        assert table.negative_NK[i].tolist() == there + [NO_TEXT] * (2 - len(there))


DISTINCT_QUERIES = {row.anchor for row in EVERY_ROW}

DISTINCT_DOCUMENTS = {text for row in EVERY_ROW for text in (row.positive, *row.negatives)}


def test_one_template_stores_a_text_once(tmp_path: Path) -> None:
    recipe = recipe_of("mat {text} .")
    assert query_format(recipe) == document_format(recipe)
    corpus = build_corpus(SOURCES, recipe, tiny_tokenizer(), tmp_path)
    assert_rows_hold(corpus, "mat {text} .", "mat {text} .")
    assert DISTINCT_QUERIES & DISTINCT_DOCUMENTS
    assert len(corpus.store) == len(DISTINCT_QUERIES | DISTINCT_DOCUMENTS) == 8
    assert corpus.table.anchor_N[0] == corpus.table.positive_N[1] == corpus.table.negative_NK[2, 0]


def test_two_templates_map_to_the_right_rows(tmp_path: Path) -> None:
    query, document = "mat {text} .", "man runs {text}"
    recipe = recipe_of(query, document)
    corpus = build_corpus(SOURCES, recipe, tiny_tokenizer(), tmp_path)
    assert_rows_hold(corpus, query, document)
    assert len(corpus.store) == len(DISTINCT_QUERIES) + len(DISTINCT_DOCUMENTS)
    assert corpus.table.anchor_N[4] != corpus.table.positive_N[4]  # rain, in either template
    used = {*corpus.table.anchor_N, *corpus.table.positive_N, *corpus.table.negative_NK.flat}
    assert used - {NO_TEXT} == set(range(len(corpus.store)))


def test_a_document_template_equal_to_the_other_is_one(tmp_path: Path) -> None:
    recipe = recipe_of("mat {text} .", "mat {text} .")
    assert len(build_corpus(SOURCES, recipe, tiny_tokenizer(), tmp_path).store) == 8


def test_long_texts_are_cut_to_their_limit(tmp_path: Path) -> None:
    rows = [[TrainRow("the big red cat sat", "a dog ran in rain", ())]]
    recipe = recipe_of("mat {text} .", "{text}", max_tokens=3)
    corpus = build_corpus(rows, recipe, tiny_tokenizer(), tmp_path)
    assert decoded(corpus, corpus.table.anchor_N[0]) == "mat the big red . </s>"
    assert decoded(corpus, corpus.table.positive_N[0]) == "a dog ran </s>"
    assert corpus.table.negative_NK.shape == (1, 0)


def test_from_cache_says_whether_all_was_there(tmp_path: Path) -> None:
    query, document, other = "mat {text} .", "man runs {text}", "woman runs {text}"

    def build(first: str, second: str) -> Corpus:
        return build_corpus(SOURCES, recipe_of(first, second), tiny_tokenizer(), tmp_path)

    made = build(query, document)
    assert not made.from_cache
    again = build(query, document)
    assert again.from_cache
    assert again.store.ids.tolist() == made.store.ids.tolist()
    assert again.table.negative_NK.tolist() == made.table.negative_NK.tolist()
    assert_rows_hold(again, query, document)
    half = build(query, other)
    assert not half.from_cache
    assert_rows_hold(half, query, other)


def test_sources_of_a_recipe() -> None:
    sources = [DataSource(path="demo", limit=5), DataSource(path="demo", limit=3, seed=1)]
    rows, reports = read_sources(DataSection(sources=sources))
    assert [len(of_source) for of_source in rows] == [5, 3]
    assert all(isinstance(row, TrainRow) for of_source in rows for row in of_source)
    assert all(report.num_read >= 5 and not report.skipped for report in reports)
    assert rows[0][:3] != rows[1]
