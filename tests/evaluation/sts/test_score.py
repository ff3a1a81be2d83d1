"""The same number three ways: our evaluator, sentence-transformers' and mteb's, on the same pairs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowmem_cft.data.rows import ScoredPair
from lowmem_cft.evaluation.sts import mteb_results as task_result
from lowmem_cft.evaluation.sts import report as eval_report
from lowmem_cft.evaluation.sts import score as evaluate
from lowmem_cft.evaluation.sts import sets
from lowmem_cft.evaluation.sts.protocols import PROTOCOLS, SETS, find_in
from lowmem_cft.evaluation.sts.sets import load_set
from lowmem_cft.inference import embedder
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
    found = evaluator(model)
    return Numbers(found["spearman_cosine"], found["pearson_cosine"])


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
        kept = int(draw.integers(0, 7))
        other = words[:kept] + list(draw.choice(WORDS, 8 - kept))
        assert other != words
        lines.append(f"{' '.join(words)}\t{' '.join(other)}\t{kept / 2}")
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


# --- results as mteb's ------------------------------------------------------------------------


def small_report(names: list[str]) -> eval_report.StsReport:
    draw = np.random.default_rng(0)
    sets = []
    for name in names:
        gold = draw.uniform(0, 5, 50)
        cosine = gold / 5 + 0.2 * draw.normal(size=50)
        rho = float(draw.uniform(0.5, 0.9))
        version = "revision:a0d554a64d88" if name == "STS12" else "sha256:ca803d1deb71"
        score = evaluate.SetScore(name, rho, 50, 50, f"{name}.tsv", rho - 0.1, version)
        sets.append(evaluate.ScoredSet(score, cosine, gold, "0" * 64))
    return eval_report.report("m", sets, protocol=MTEB, num_resamples=2)


def test_mteb_reads_the_results_back(tmp_path: Path) -> None:
    pytest.importorskip("mteb", reason="mteb is not installed (it needs Python 3.11)")
    from mteb.results import TaskResult

    found = small_report([entry.name for entry in MTEB.sets])
    paths = task_result.write_task_results(found, tmp_path / "results")
    assert len(paths) == 9
    for path, score in zip(paths, found.scores, strict=True):
        read = TaskResult.from_disk(path)
        assert read.task.metadata.name == path.stem == score.name.removesuffix("-test")
        assert read.get_score() == pytest.approx(score.spearman, abs=1e-12)
        (entry,) = read.scores["test"]
        assert entry["main_score"] == entry[read.task.metadata.main_score]
        assert entry["cosine_pearson"] == pytest.approx(score.pearson, abs=1e-12)
        assert entry["hf_subset"] in read.task.hf_subsets
        assert read.task.eval_splits == ["test"]
        assert read.languages == ["eng"]
        assert read.dataset_revision == score.version.removeprefix("revision:")
        again = tmp_path / "again.json"
        read.to_disk(again)
        assert TaskResult.from_disk(again).get_score() == pytest.approx(score.spearman, abs=1e-6)


@pytest.mark.parametrize("what", ["another protocol", "no protocol", "clean-up"])
def test_only_mteb_scores_become_mteb_results(tmp_path: Path, what: str) -> None:
    protocol = {"another protocol": PROTOCOLS["senteval"], "no protocol": None}.get(what, MTEB)
    one = small_report(["STS12"]).sets
    cleaned_up = what == "clean-up"
    found = eval_report.report("m", one, protocol=protocol, cleaned_up=cleaned_up, num_resamples=2)
    with pytest.raises(ValueError, match="`mteb_out`"):
        task_result.write_task_results(found, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_only_mtebs_texts_become_mteb_results(tmp_path: Path) -> None:
    one, other = small_report(["STS12", "BIOSSES"]).sets
    other = replace(other, score=replace(other.score, own_text=False))
    found = eval_report.report("m", [one, other], protocol=MTEB, num_resamples=2)
    with pytest.raises(ValueError, match="`mteb_out`: BIOSSES: the text at hand"):
        task_result.write_task_results(found, tmp_path / "results")
    assert not (tmp_path / "results").exists()


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
    assert embedder.is_plain_sentence_transformer(folder)
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


def test_a_plain_model_takes_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match="leave out `recipe` and `overrides`"):
        embedder.load_embedder(
            str(tmp_path), torch.device("cpu"), lambda text: None, overrides=["text.max_tokens=3"]
        )
    (tmp_path / "lowmem_cft.json").write_text("{}")
    assert not embedder.is_plain_sentence_transformer(tmp_path)
