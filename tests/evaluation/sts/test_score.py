"""A set's score, and the same number three ways: ours, sentence-transformers' and mteb's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowmem_cft.data.rows import ScoredPair
from lowmem_cft.evaluation.sts import score as evaluate
from lowmem_cft.evaluation.sts import sets
from lowmem_cft.evaluation.sts.protocols import PROTOCOLS, SETS, find_in
from lowmem_cft.evaluation.sts.sets import LoadedSet, load_set, pairs_sha256
from lowmem_cft.inference import embedder
from lowmem_cft.inference.embed import Vectors
from lowmem_cft.model.precision import float32_arithmetic, keep_weight_layout
from lowmem_cft.training import pipeline
from lowmem_cft.training.records import Metrics
from minilm import minilm_folder
from running import MakeRecipe, Silent
from tiny import WORDS

FOUR_DECIMALS = 0.5e-4
MTEB = PROTOCOLS["mteb"]


pytestmark = pytest.mark.usefixtures("traced_once")


@dataclass(frozen=True)
class Numbers:
    spearman: float
    pearson: float


def exported(folder: Path) -> Any:
    """The export as sentence-transformers loads it, 4-bit layers in their stored layout.

    On CPUs with bf16 instructions bitsandbytes would compute them from a copy with rounded scales:
    another model by a little, and none at all where a layer is narrower than its blocks.
    """
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    keep_weight_layout(model)
    return model


def by_sentence_transformers(model: Any, pairs: list[ScoredPair]) -> Numbers:
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    evaluator = EmbeddingSimilarityEvaluator(
        [pair.sentence1 for pair in pairs],
        [pair.sentence2 for pair in pairs],
        [pair.score for pair in pairs],
        main_similarity="cosine",
        write_csv=False,
    )
    scores = evaluator(model)
    return Numbers(scores["spearman_cosine"], scores["pearson_cosine"])


def by_mteb(model: Any, pairs: list[ScoredPair], subset: str = "default") -> dict[str, Any]:
    """mteb's own evaluation of a task whose data are these pairs; no hub."""
    mteb = pytest.importorskip("mteb", reason="mteb is not installed (it needs Python 3.11)")
    import datasets
    from mteb.models import SentenceTransformerEncoderWrapper

    columns = {key: [getattr(p, key) for p in pairs] for key in ("sentence1", "sentence2", "score")}
    split = datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)})
    if subset == "default":
        task, task_data = mteb.get_task("STS12"), split
    else:
        task, task_data = mteb.get_task("STS17", hf_subsets=[subset]), {subset: split}
    task.dataset, task.data_loaded = task_data, True
    wrapped = SentenceTransformerEncoderWrapper(model)
    results = mteb.evaluate(wrapped, task, cache=None, overwrite_strategy="always")
    (scores,) = results.task_results[0].scores["test"]
    assert scores["hf_subset"] == subset
    found: dict[str, Any] = scores
    return found


def related_pairs(path: Path) -> Path:
    """300 pairs that share more words the higher their score.

    No two sentences are equal: whether equal ones are tied at a cosine of 1 or told apart by
    rounding differs from one implementation to the next.
    """
    draw = np.random.default_rng(0)
    lines = ["sentence1\tsentence2\tscore"]
    for _ in range(300):
        words = list(draw.choice(WORDS, 8))
        num_shared = int(draw.integers(0, 7))
        other = list(words)
        while other[:7] == words[:7]:  # nor where the last word is cut
            other = words[:num_shared] + list(draw.choice(WORDS, 8 - num_shared))
        lines.append(f"{' '.join(words)}\t{' '.join(other)}\t{num_shared / 2}")
    path.write_text("\n".join(lines) + "\n")
    return path


CASES: dict[str, dict[str, Any]] = {
    "adapter": {"model": {"quantization": "none"}},
    "adapter on 4-bit weights": {"model": {"quantization": "nf4"}},
    "template, end-of-sequence token": {
        "model": {"quantization": "none"},
        "text": {"template": 'a cat on: "{text}" is one', "append_eos": True},
        "embedding": {"pooling": "eos", "normalize": True},
    },
    "templates by role, texts that are cut": {
        "model": {"quantization": "none"},
        "text": {
            "template": "a small man on : {text}",
            "document_template": "the cat {text}",
            "max_tokens": 7,
        },
    },
    "a template that goes on, texts that are cut": {
        "model": {"quantization": "none"},
        "text": {"template": "a man : {text} is happy .", "max_tokens": 7},
        "embedding": {"pooling": "eos"},
    },
    "trained decoder on STS17": {"model": {"quantization": "none"}, "text": {"max_tokens": 128}},
}


@pytest.fixture(params=CASES)
def run_and_pairs(
    request: pytest.FixtureRequest,
    make_recipe: MakeRecipe,
    tmp_path: Path,
) -> tuple[Path, Metrics, list[ScoredPair]]:
    """A short run, its metrics and the pairs it was scored on."""
    pytest.importorskip("sentence_transformers")
    sections = {"embedding": {"pooling": "mean"}, **CASES[request.param], "train": {"steps": 2}}
    if "STS17" in request.param:
        data = request.getfixturevalue("data_folder")
        decoder = data / "stories260K-hf"
        if not decoder.is_dir() or find_in(SETS["STS17"], data) is None:
            pytest.skip("the data folder has not stories260K-hf and STS17")
        name = "STS17"
        sections["model"] = {**sections["model"], "id": str(decoder)}
    else:
        name = str(related_pairs(tmp_path / "pairs.tsv"))
    folder, metrics = pipeline.run_recipe(
        make_recipe(**sections, eval={"sets": [name]}), Silent(), offline=True
    )
    pairs = load_set(name, sets.data_folder(), offline=True).pairs
    return folder.path, metrics, pairs


def test_three_ways_agree(run_and_pairs: tuple[Path, Metrics, list[ScoredPair]]) -> None:
    run, metrics, pairs = run_and_pairs
    (ours,) = metrics.after
    assert ours.num_pairs == len(pairs) >= 250
    assert 0.1 < ours.spearman < 0.99
    assert abs(ours.spearman - metrics.before[0].spearman) > 2 * FOUR_DECIMALS
    model = exported(run / "model")
    theirs = by_sentence_transformers(model, pairs)
    assert ours.spearman == pytest.approx(theirs.spearman, abs=FOUR_DECIMALS)
    assert ours.pearson == pytest.approx(theirs.pearson, abs=FOUR_DECIMALS)
    mteb = by_mteb(model, pairs)
    assert ours.spearman == pytest.approx(mteb["cosine_spearman"], abs=FOUR_DECIMALS)
    assert ours.pearson == pytest.approx(mteb["cosine_pearson"], abs=FOUR_DECIMALS)
    assert mteb["main_score"] == mteb["cosine_spearman"]


def test_sixteen_bit_models_agree_in_float32(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """In 16 bit what a text is batched with shifts a score; computed in float32 it does not."""
    pairs_file = str(related_pairs(tmp_path / "pairs.tsv"))
    made = make_recipe(
        model={"dtype": "bf16"},
        train={"steps": 2},
        eval={"sets": [pairs_file]},
        embedding={"pooling": "mean"},
    )
    folder, metrics = pipeline.run_recipe(made, Silent(), offline=True)
    loaded = load_set(pairs_file, None)
    model = exported(folder.model)
    with float32_arithmetic(model):
        theirs = by_sentence_transformers(model, loaded.pairs)
        mteb = by_mteb(model, loaded.pairs)
    assert metrics.after[0].pearson != pytest.approx(theirs.pearson, abs=1e-6), "no 16 bit"
    for name in (folder.path, folder.model):
        embed = embedder.load_embedder(
            str(name), torch.device("cpu"), lambda text: None, float32=True
        ).embed
        ours = evaluate.score_pairs(embed, loaded).score
        assert ours.spearman == pytest.approx(theirs.spearman, abs=FOUR_DECIMALS)
        assert ours.pearson == pytest.approx(theirs.pearson, abs=FOUR_DECIMALS)
        assert ours.spearman == pytest.approx(mteb["main_score"], abs=FOUR_DECIMALS)


# --- a model of known scores ------------------------------------------------------------------

MINILM = {
    "STS12": 72.37,
    "STS13": 80.60,
    "STS14": 75.59,
    "STS15": 85.39,
    "STS16": 78.99,
    "STS17": 87.59,
    "STSBenchmark-test": 82.03,
    "BIOSSES": 81.25,
    "SICK-R": 77.58,
}
"""Spearman x 100 of all-MiniLM-L6-v2 under mteb's protocol.

Those of STS12, STS13, STS16, STSBenchmark-test and SICK-R equal mteb's published results.
"""

ALL_SETS = "LOWMEM_CFT_TEST_ALL_STS"


@pytest.mark.parametrize("names", [["STS17"], list(MINILM)], ids=["small", "all nine"])
def test_minilm_has_its_known_scores(data_folder: Path, tmp_path: Path, names: list[str]) -> None:
    pytest.importorskip("sentence_transformers")
    if len(names) == len(MINILM) and not os.environ.get(ALL_SETS):
        pytest.skip(f"minutes on a CPU; {ALL_SETS}=1 runs it")
    if any(find_in(entry, data_folder) is None for entry in MTEB.sets):
        pytest.skip("the data folder has not all sets of the mteb protocol")
    folder = minilm_folder(tmp_path)
    assert embedder.is_sentence_transformer(str(folder))
    said: list[str] = []
    embed = embedder.load_embedder(
        str(folder), torch.device("cpu"), said.append, normalize=False
    ).embed
    assert "as its modules give them (Transformer, Pooling, Normalize)" in said[-1]
    for name in names:
        loaded = load_set(name, data_folder, offline=True, protocol=MTEB)
        score = evaluate.score_pairs(embed, loaded).score
        assert round(100 * score.spearman, 2) == pytest.approx(MINILM[name], abs=0.01), name
        if name == "STS17":
            mteb = by_mteb(exported(folder), loaded.pairs, "en-en")
            assert score.spearman == pytest.approx(mteb["main_score"], abs=FOUR_DECIMALS)


# --- a set's score ----------------------------------------------------------------------------


def lengths(texts: Sequence[str]) -> Vectors:
    """An embedding that sees a text's length and number of spaces."""
    return np.array([[len(t), 1 + t.count(" "), 3] for t in texts], dtype=np.float32)


def test_score_and_pairs_belong_together() -> None:
    draw = np.random.default_rng(0)
    word = lambda: "x" * int(draw.integers(1, 9)) + " y" * int(draw.integers(0, 4))
    pairs = [ScoredPair(word(), word(), float(draw.integers(0, 6))) for _ in range(60)]
    scored = evaluate.score_pairs(lengths, LoadedSet("some", pairs, None, "some.tsv", "sha256:0"))
    firsts, seconds = (
        lengths([getattr(p, side) for p in pairs]) for side in ("sentence1", "sentence2")
    )
    wanted = (
        (firsts * seconds).sum(1) / np.linalg.norm(firsts, axis=1) / np.linalg.norm(seconds, axis=1)
    )
    assert scored.cosine_P == pytest.approx(wanted, abs=1e-6)
    assert np.ptp(scored.cosine_P) > 0.1
    assert list(scored.gold_P) == [pair.score for pair in pairs]
    assert scored.sha256 == pairs_sha256(pairs)
    assert (scored.score.num_pairs, scored.score.version) == (60, "sha256:0")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_embedding_that_is_no_number_has_no_score(value: float) -> None:
    """One text's overflow would else make the whole set a 0.00."""
    pairs = [ScoredPair("x" * i, "y" * (i * i % 11 + 1), float(i)) for i in range(1, 9)]

    def overflows(texts: Sequence[str]) -> Vectors:
        emb_PD = lengths(texts)
        emb_PD[[text in ("xxx", "yy") for text in texts], 1] = value
        return emb_PD

    loaded = LoadedSet("some", pairs, None, "some.tsv")
    with pytest.raises(ValueError, match=r"some: 2 of 16 embeddings are not finite; use a wider"):
        evaluate.score_pairs(overflows, loaded)
    assert evaluate.score_pairs(lengths, loaded).score.spearman != 0


def test_scores_survive_json(tmp_path: Path) -> None:
    """The trainer keeps them in metrics.json, older ones without the newer fields."""
    score = evaluate.SetScore("a", 0.5, 3, None, "a.tsv", 0.4, "sha256:1", False)
    assert evaluate.SetScore(**vars(score)) == score
    old = {"name": "a", "spearman": 0.5, "num_pairs": 3, "set_pairs": None, "source": "a.tsv"}
    assert evaluate.SetScore(**old).pearson is None
