"""What an exported model's folder says of itself, and its tokenizer without what the export added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowmem_cft.data.tokens import Tokenizer, set_special_tokens
from lowmem_cft.files import read_json

RECORD = "lowmem_cft.json"
"""File of an exported model that says how it embeds."""

_WAY_OUT = "export the run again"


def read_record(folder: Path) -> dict[str, Any] | None:
    """What an export's folder says of itself; None for any other folder.

    Raises:
        ValueError: it cannot be read.
    """
    if not (folder / RECORD).is_file():
        return None
    return read_json(folder / RECORD, _WAY_OUT, "kind", "recipe")


def plain_tokenizer(tokenizer: Tokenizer, record: dict[str, Any]) -> Tokenizer:
    """The base model's tokenizer: an export's, changed in place.

    An export's puts a template's tail around every text, which a recipe would put there once more.
    Those of older versions also have the template in their normaliser.
    """
    from tokenizers import Tokenizer as Backend

    backend = tokenizer.backend_tokenizer
    if (special := record.get("special_tokens")) is not None:
        set_special_tokens(tokenizer, special["opening"], special["closing"])
    else:
        state = json.loads(backend.to_str())
        state["normalizer"] = _without_template(state["normalizer"], record["recipe"]["text"])
        backend.normalizer = Backend.from_str(json.dumps(state)).normalizer
    return tokenizer


def _without_template(normalizer: dict[str, Any] | None, text: dict[str, Any]) -> Any:
    """An older export's normaliser without the steps that put the template around a text."""
    head, _, tail = text["template"].partition("{text}")
    if text["document_template"] not in (None, text["template"]):
        return normalizer  # templates by role were prompts
    added = bool(head) + bool(tail)
    if not added:
        return normalizer
    assert normalizer is not None
    rest = normalizer["normalizers"][added:]
    return {"type": "Sequence", "normalizers": rest} if rest else None
