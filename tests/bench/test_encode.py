"""The benchmark of embedding on a tiny model: its sides embed the same, and its last line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import encode
from bench.peers import base_in_st
from lowmem_cft.data.tokens import TextFormat
from lowmem_cft.evaluation.search.demonstrations import PROMPTEOL
from lowmem_cft.inference.embed import Vectors, embed_texts
from lowmem_cft.model.backbone import find_backbone, load_backbone
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.recipe.schema import ModelSection
from tiny import save_tiny

pytest.importorskip("sentence_transformers")
CPU = torch.device("cpu")
TEXTS = ["the cat sat on the mat .", "a dog ran", "sad", "the cat sat on the mat .", "two red sun"]


@pytest.fixture(autouse=True)
def _no_real_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWMEM_CFT_DATA", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bench") / "smollm", "smollm")


def test_last_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--model",
        str(folder),
        "--texts",
        "40",
        "--rounds",
        "2",
        "--batch-sizes",
        "4",
        "8",
    ]
    assert encode.main(arguments) == 0
    out, err = capfd.readouterr()
    (line,) = out.splitlines()
    results = json.loads(line)
    assert 0 < results["max_abs_diff"] < 1e-5
    assert 0 < results["prefix_max_abs_diff"] < 1e-5
    (row,), (prefix_row,) = results["rows"], results["prefix_rows"]
    assert results["speedup"] == pytest.approx(row["st_s"] / row["ours_s"], abs=0.01)
    assert results["prefix_speedup"] == pytest.approx(
        prefix_row["each_s"] / prefix_row["once_s"], abs=0.01
    )
    assert (row["set"], row["distinct"], results["distinct"]) == ("demo", 40, 40)
    assert results["st_batch"] in (4, 8)
    assert results["rounds"] == 2
    assert "seconds by batch size" in err
    assert err.index("round 1/2  demo  st") < err.index("round 1/2  demo  ours")
    assert err.index("round 2/2  demo  ours") < err.index("round 2/2  demo  st")


def test_quick_is_a_sample(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(encode, "_QUICK_TEXTS", 10)
    monkeypatch.setattr(encode, "_QUICK_PREFIX_TEXTS", 90)
    monkeypatch.setattr(encode, "print_line", seen.update)
    assert encode.main(["--quick", "--model", str(folder)]) == 0
    assert {"speedup", "max_abs_diff", "prefix_speedup"} <= seen.keys()
    assert (seen["rounds"], seen["st_batch"], seen["distinct"]) == (1, 32, 10)
    assert seen["prefix_rows"][0]["distinct"] == 90


@pytest.mark.parametrize("family", ["smollm", "opt", "gemma"])
def test_both_sides_embed_the_same(tmp_path: Path, family: str) -> None:
    section = ModelSection(
        id=str(save_tiny(tmp_path / family, family)), quantization="none", dtype="fp32"
    )
    source = find_backbone(section)
    text_format = TextFormat("{text}", append_eos=True, max_tokens=64)
    encoder = Encoder(load_backbone(section, CPU).model, pooling="last", normalize=True)
    st = base_in_st(section, source, text_format, CPU, tmp_path / "st", normalize=True)
    theirs, ours = st.encode(TEXTS), embed_texts(encoder, source.tokenizer, TEXTS, text_format)
    assert float(ours.std(axis=0).max()) > 0.01, "the texts embed alike: nothing is compared"
    assert float(np.abs(theirs - ours).max()) < 1e-5


def test_a_difference_is_seen() -> None:
    def one(texts: list[str]) -> Vectors:
        return np.ones((len(texts), 3), dtype=np.float32)

    def other(texts: list[str]) -> Vectors:
        return one(texts) + np.eye(len(texts), 3, 2, dtype=np.float32) / 4

    (row,) = encode.compare({"st": one, "ours": other}, {"some": TEXTS}, 3, CPU)
    assert (row["texts"], row["distinct"], row["max_abs_diff"]) == (5, 4, 0.25)


def test_a_prefix_that_is_not_shared_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem_cft.inference import prefix_sharing as sharing
    from lowmem_cft.model.prefix import NotShared

    def refuse(*args: Any) -> Any:
        raise NotShared("injected")

    monkeypatch.setattr(sharing, "run_prefix", refuse)
    with pytest.raises(RuntimeError, match="injected"):
        encode.main(["--quick", "--model", str(folder)])


def test_too_few_texts_to_share_a_prefix_is_an_error(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="no prefix was shared: take more --texts"):
        encode.main(["--model", str(folder), "--texts", "2", "--rounds", "1"])


@pytest.mark.parametrize("rounds", ["0", "-1"])
def test_no_rounds_are_refused(
    folder: Path, rounds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        encode.main(["--quick", "--model", str(folder), "--rounds", rounds])
    assert stopped.value.code == 2
    assert f"--rounds: got {rounds}, wanted at least 1" in capsys.readouterr().err


def test_samples_keep_every_occurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem_cft.data.rows import ScoredPair
    from lowmem_cft.evaluation.sts.sets import LoadedSet

    pairs = [ScoredPair(f"text {i % 10}", f"text {i % 7 + 20}", float(i)) for i in range(70)]
    monkeypatch.setattr(encode, "data_folder", lambda: None)
    monkeypatch.setattr(
        encode, "load_set", lambda name, *args, **options: LoadedSet(name, pairs, None, "x")
    )
    whole = encode.sentences(["a", "b"], None)
    assert {name: len(texts) for name, texts in whole.items()} == {"a": 140, "b": 140}
    some = encode.sentences(["a", "b"], 8)
    for texts in some.values():
        assert len(set(texts)) == 4
        assert all(texts.count(text) == whole["a"].count(text) > 1 for text in texts)
    assert encode.sentences(["a", "b"], 34) == whole


def test_demonstrated_has_about_20_tokens() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    template, tokens = encode.demonstrated(tokenizer)
    assert template.endswith(f'".{PROMPTEOL}')
    assert template.count("{text}") == 1
    assert tokens == len(tokenizer(template.removesuffix(PROMPTEOL))["input_ids"])
    assert abs(tokens - encode.DEMONSTRATION_TOKENS) <= 1
