"""What stands in a cell as a text: a string, a titled passage, an instruction and a text, messages.

The forms are those of published training data: passages are Tevatron's, [instruction, text] is
INSTRUCTOR's, messages are those of chat data, of which ms-swift trains embeddings.
"""

from __future__ import annotations

from typing import Any

_ROLES = {"human": "user", "gpt": "assistant"}


def is_instruction_pair(cell: Any) -> bool:
    """[instruction, text]."""
    return isinstance(cell, list) and len(cell) == 2 and all(isinstance(i, str) for i in cell)


def is_conversation(cell: Any) -> bool:
    """A list of messages, {"role": ..., "content": ...} or ShareGPT's {"from": ..., "value": ...}."""
    return isinstance(cell, list) and bool(cell) and all(_message(item) for item in cell)


def turns(conversation: Any) -> list[tuple[str, Any]]:
    """Role and content of each message."""
    said = [_message(item) for item in conversation]
    return [turn for turn in said if turn is not None]


def _message(item: Any) -> tuple[str, Any] | None:
    if not isinstance(item, dict):
        return None
    for role_key, content_key in (("role", "content"), ("from", "value")):
        role = item.get(role_key)
        if isinstance(role, str) and content_key in item:
            return _ROLES.get(role, role), _parts_joined(item[content_key])
    return None


def _parts_joined(content: Any) -> Any:
    """The text of a content that is a list of parts, if it is text alone."""
    if not isinstance(content, list):
        return content
    texts = [part["text"] for part in content if _is_text_part(part)]
    return "".join(texts) if len(texts) == len(content) else content


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def passages(cell: Any, *, paired: bool) -> list[Any]:
    """The texts of a cell of positives or negatives, each as `text_of` takes it.

    `paired`: the row's anchor is an [instruction, text], so that two strings are one too.
    """
    one = not isinstance(cell, list) or is_conversation(cell)
    return [cell] if one or (paired and is_instruction_pair(cell)) else cell


def text_of(value: Any) -> str | None:
    """The text that a value stands for, None for nothing.

    A passage with a title begins with it, as in Tevatron. An instruction stands directly before its
    text, as INSTRUCTOR puts them, with a space where neither has one. Of messages there is one.

    Raises:
        ValueError: it is something else; the message says what is wanted.
    """
    if value is None or isinstance(value, str):
        return value
    if is_instruction_pair(value):
        instruction, text = value
        space = instruction and not instruction[-1:].isspace() and not text[:1].isspace()
        return f"{instruction} {text}" if space else instruction + text
    if is_conversation(value):
        said = turns(value)
        if len(said) != 1 or not isinstance(said[0][1], str):
            raise ValueError("wanted one message, of text alone")
        return said[0][1]
    if isinstance(value, dict) and "text" in value:
        title, text = value.get("title"), value["text"]
        if isinstance(text, str) and text.strip() and isinstance(title, str) and title.strip():
            return f"{title.strip()} {text.strip()}"
        if text is None or isinstance(text, str):
            return text
    raise ValueError("wanted a string")
