"""The text clean-up that the PromptEOL paper's evaluation applies before the template.

Source: evaluation.py of "Scaling Sentence Embeddings with Large Language Models"; training texts
are not treated so. It is of use where a template closes a quotation after the text: the text then
holds no double quote of its own and ends as a statement does.
"""

from __future__ import annotations

NAME = "PromptEOL text clean-up"

_ENDINGS = (".", "?", '"', "'")


def clean_up(text: str) -> str:
    """End in a full stop, unless in a quote; single quotes for double ones; no final '?'."""
    if text and not text.endswith(_ENDINGS):
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text
