"""The token ids and positions that a model has, and texts that go beyond them.

Beyond the embedding table, or a table of learned positions, a model fails somewhere inside with an
index error (on a GPU with a device-side assertion, which ends the process).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lowmem_cft.data.tokens import Tokenizer, TokenStore

_POSITION_TABLES = ("wpe", "embed_positions", "positions_embed", "position_embeddings")
_POSITION_BUFFERS = ("embed_positions", "pos_encoding")  # GPT-J and CodeGen, CTRL


def num_ids(config: Any) -> int | None:
    """Rows of the embedding table by the configuration; None where it does not say."""
    rows: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return rows


def most_positions(model: Any) -> int | None:
    """Tokens of the longest text that a transformers model, weights or not, can take at all.

    None where there is no such bound: rotary and relative positions go on.
    """
    if model.config.model_type == "mpt":
        return int(model.config.max_seq_len)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES:
            before_first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - int(getattr(module, "offset", before_first))
    for name, buffer in model.named_buffers():
        if buffer.ndim == 2 and name.rpartition(".")[2] in _POSITION_BUFFERS:
            return int(buffer.shape[0])
    return None


def choose_padding(tokenizer: Tokenizer, num_ids: int | None) -> None:
    """Give a tokenizer a padding token that is in the embedding table, if it has none such.

    Padding reaches no embedding and no loss, so any special token serves.

    Args:
        num_ids: rows of the embedding table, None for as many as there are tokens.

    Raises:
        ValueError: there is no special token to take.
    """

    def inside(token_id: int | None) -> bool:
        return token_id is not None and (num_ids is None or token_id < num_ids)

    if inside(tokenizer.pad_token_id):
        return
    special = sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    ids = [tokenizer.eos_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids, *special]
    found = next((i for i in ids if inside(i)), None)
    if found is None:
        raise ValueError(
            "model.id: the tokenizer has no padding token with an embedding, nor any other "
            'special token; name a token that no text has as "pad_token" in its '
            "tokenizer_config.json"
        )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(found)


def check_ids(model: Any, tokenizer: Tokenizer, store: TokenStore) -> None:
    """Refuse texts with tokens that a transformers model, weights or not, has no embedding for.

    Raises:
        ValueError: the greatest id is beyond the embedding table.
    """
    rows = model.get_input_embeddings().num_embeddings
    largest = int(store.ids.max(initial=0))
    if largest >= rows:
        kind = type(model).__name__
        raise ValueError(
            f"model.id: token {tokenizer.convert_ids_to_tokens(largest)!r} of the tokenizer has id "
            f"{largest}, but the {kind} has embeddings for the ids 0 to {rows - 1} only; use the "
            "tokenizer that belongs to these weights, or save the model again after "
            f"model.resize_token_embeddings({len(tokenizer)})"
        )


def check_length(model: Any, longest: int, overhead: int) -> None:
    """Refuse texts that are longer than a transformers model, weights or not, can take.

    Args:
        longest: tokens of the longest text.
        overhead: how many of them come on top of `max_tokens`.

    Raises:
        ValueError: it is beyond the model's table of positions.
    """
    most = most_positions(model)
    if most is None or longest <= most:
        return
    way_out = (
        f"set text.max_tokens: {most - overhead} or less"
        if most > overhead
        else "shorten text.template"
    )
    raise ValueError(
        f"text.max_tokens: texts may have {longest} tokens with their template and special "
        f"tokens, but the {type(model).__name__} has positions for {most} only; {way_out}"
    )


def beyond_trained(config: Any, longest: int) -> str | None:
    """What to say of texts that are longer than any the model was trained on; None if none is."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None or not 0 < positions < longest:
        return None
    return (
        f"texts have up to {longest} tokens, but the model was trained on {positions} positions "
        "(max_position_embeddings): what is beyond may embed badly"
    )
