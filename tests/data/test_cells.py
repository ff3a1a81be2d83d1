"""Texts as published training data have them: instructions, messages, lists of either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowmem_cft.data.cells import is_conversation, passages, text_of, turns
from lowmem_cft.data.rows import (
    ScoredPair,
    TrainRow,
    read_scored_pairs,
    read_training_rows,
)
from row_files import error, jsonl, write, write_rows


def said(*messages: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in messages]


def user(text: Any) -> list[dict[str, Any]]:
    return said(("user", text))


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        (["Represent the question: ", "why?"], "Represent the question: why?"),
        (["Instruct: find answers\nQuery:", "why?"], "Instruct: find answers\nQuery: why?"),
        (["Find answers\n", "why?"], "Find answers\nwhy?"),
        (["", "why?"], "why?"),
    ],
)
def test_an_instruction_stands_before_its_text(pair: list[str], text: str) -> None:
    assert text_of(pair) == text


def test_instructor_and_gritlm_rows(tmp_path: Path) -> None:
    """INSTRUCTOR's are one pair for each role, GritLM's documents are lists of pairs."""
    instructor = {"query": ["Q: ", "why"], "pos": ["D: ", "so"], "neg": ["D: ", "no"]}
    gritlm = {
        "query": ["Q: ", "why"],
        "pos": [["D: ", "so"]],
        "neg": [["D: ", "no"], ["", "never"]],
    }
    plain = {"query": "why", "pos": ["so", "thus"], "neg": ["no"]}
    rows, _ = read_training_rows(write(tmp_path / "a.jsonl", jsonl(instructor, gritlm, plain)))
    assert rows == [
        TrainRow("Q: why", "D: so", ("D: no",)),
        TrainRow("Q: why", "D: so", ("D: no", "never")),
        TrainRow("why", "so", ("no",)),
        TrainRow("why", "thus", ("no",)),
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_conversations(suffix: str, tmp_path: Path) -> None:
    """A user's text and an assistant's; ms-swift's conversations for each role."""
    cells: list[list[Any]] = [[said(("user", "why"), ("assistant", " so "))]]
    path = write_rows(tmp_path / f"chat.{suffix}", ["messages"], cells)
    rows, report = read_training_rows(path)
    assert rows == [TrainRow("why", "so", ())]
    assert report.columns == {"anchor": "messages", "positive": "messages", "negatives": []}
    swift = ["messages", "positive_messages", "negative_messages"]
    cells = [[user("why"), [user("so"), user("thus")], [user("no"), user("never")]]]
    rows, _ = read_training_rows(write_rows(tmp_path / f"swift.{suffix}", swift, cells))
    assert rows == [TrainRow("why", positive, ("no", "never")) for positive in ("so", "thus")]
    cells = [[user("why"), user("so"), user("no")]]
    rows, _ = read_training_rows(write_rows(tmp_path / f"one.{suffix}", swift, cells))
    assert rows == [TrainRow("why", "so", ("no",))]


def test_sharegpt_and_contents_of_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "wh"}, {"type": "text", "text": "y"}]
    share = [{"from": "human", "value": parts}, {"from": "gpt", "value": "so"}]
    rows, _ = read_training_rows(write(tmp_path / "a.jsonl", jsonl({"conversations": share})))
    assert rows == [TrainRow("why", "so", ())]
    assert turns(share) == [("user", "why"), ("assistant", "so")]
    assert not is_conversation([{"role": "user"}])
    assert passages([{"text": "a"}, {"text": "b"}], paired=True) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": said(("system", "s"), ("user", "q"), ("assistant", "a"))},
            r"line 1, column 'messages': other turns: got messages of ['system', 'user', "
            r"'assistant'], wanted user, assistant; fix the row",
        ),
        (
            {"messages": user([{"type": "image"}]), "positive_messages": user("a")},
            "line 1, column 'messages': wrong type: got list [{'content': [{'type': 'image'}], "
            "'role': 'user'}], wanted one message, of text alone",
        ),
        (
            {"messages": said(("user", "q"), ("assistant", "a")), "label": 1},
            "the label column 'label' may mean that not every pair is a positive one",
        ),
        ({"anchor": ["a", "b", "c"], "positive": "p"}, "got list ['a', 'b', 'c'], wanted a string"),
        ({"anchor": {"body": "a"}, "positive": "p"}, "got dict {'body': 'a'}, wanted a string"),
    ],
)
def test_what_is_no_text_is_refused_by_what_it_is(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in error(write(tmp_path / "a.jsonl", jsonl(row)))


def test_instructions_in_scored_pairs(tmp_path: Path) -> None:
    row = {"sentence1": ["Q: ", "why"], "sentence2": ["D: ", "so"], "score": 3}
    pairs, _ = read_scored_pairs(write(tmp_path / "a.jsonl", jsonl(row)))
    assert pairs == [ScoredPair("Q: why", "D: so", 3.0)]
