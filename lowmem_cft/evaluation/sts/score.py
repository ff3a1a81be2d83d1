"""Score an encoder on STS sets: embed a set's sentences once, correlate their cosines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowmem_cft.data.tokens import TextFormat, Tokenizer
from lowmem_cft.evaluation.sts.correlation import (
    Floats,
    num_not_finite,
    paired_cosine,
    pearson,
    spearman,
)
from lowmem_cft.evaluation.sts.sets import LoadedSet, pairs_sha256
from lowmem_cft.inference.embed import Embed, Vectors, embed_texts
from lowmem_cft.model.encoder import Encoder


@dataclass(frozen=True)
class SetScore:
    """Correlations are -1 to 1; `num_pairs` counts the pairs scored, of `set_pairs` in the protocol.

    `version` tells the data (see `LoadedSet`), `own_text` whether the text is the protocol's.
    """

    name: str
    spearman: float
    num_pairs: int
    set_pairs: int | None
    source: str
    pearson: float | None = None
    version: str = ""
    own_text: bool = True


@dataclass(frozen=True)
class ScoredSet:
    """A score with the P pairs behind it; `sha256` is of the texts and gold scores, as embedded."""

    score: SetScore
    cosine_P: Floats
    gold_P: Floats
    sha256: str


def score_pairs(embed: Embed, loaded: LoadedSet) -> ScoredSet:
    """Embed the set's sentences and correlate the cosine of each pair with its gold score.

    Raises:
        ValueError: fewer than two pairs, constant gold scores, or embeddings that are not finite.
    """
    pairs = loaded.pairs
    texts = [pair.sentence1 for pair in pairs] + [pair.sentence2 for pair in pairs]
    emb_XD = embed(texts)
    if num_bad := num_not_finite(emb_XD):
        raise ValueError(
            f"{loaded.name}: {num_bad} of {len(texts)} embeddings are not finite; use a wider "
            "model.dtype, or `float32` in `eval`"
        )
    cosine_P = paired_cosine(emb_XD[: len(pairs)], emb_XD[len(pairs) :])
    gold_P = np.array([pair.score for pair in pairs], dtype=np.float64)
    score = SetScore(
        loaded.name,
        spearman(cosine_P, gold_P),
        len(pairs),
        loaded.set_pairs,
        loaded.source,
        pearson(cosine_P, gold_P),
        loaded.version,
        loaded.own_text,
    )
    return ScoredSet(score, cosine_P, gold_P, pairs_sha256(pairs))


def score_set(
    encoder: Encoder,
    tokenizer: Tokenizer,
    loaded: LoadedSet,
    text_format: TextFormat,
    token_budget: int,
) -> SetScore:
    """The set's score under an encoder; errors as in `score_pairs`."""

    def embed(texts: Sequence[str]) -> Vectors:
        return embed_texts(encoder, tokenizer, texts, text_format, token_budget=token_budget)

    return score_pairs(embed, loaded).score
