"""Our losses inside sentence-transformers' trainer, beside theirs where the options mean the same."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowmem_cft.data.batches import RowTable, step_texts
from lowmem_cft.gradient.step import candidates_of
from lowmem_cft.planning.live_bytes import LiveBytes
from lowmem_cft_kernels import (
    GTE,
    ONE_WAY,
    Direction,
    FalseNegatives,
    Hardness,
    LossOptions,
    Negatives,
)
from lowmem_cft_kernels.reference import reference_loss
from numerics import assert_same, compute_norms_in_float64, gradients, relative_error
from places import ROOT
from tiny import WORDS, save_tiny

pytest.importorskip("sentence_transformers", minversion="6.0")
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import (
    Pooling,
    StaticEmbedding,
    Transformer,
)

from lowmem_cft.integrations.sentence_transformers import (
    CachedInfoNCELoss,
    InfoNCELoss,
    text_keys,
)

MODULE = "lowmem_cft.integrations.sentence_transformers"
ROWS = 12
EXACT = 1e-10
_LIBRARY = tuple(map(int, importlib.metadata.version("sentence-transformers").split(".")[:2]))
REPLAYED = EXACT if _LIBRARY >= (6, 2) else 1e-6
"""Before 6.2 their second pass rounds the embeddings' gradients to float32."""
NAMES = ("anchor", "positive", "negative", "negative_2")
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PAIRS = [
    pytest.param(InfoNCELoss, MultipleNegativesRankingLoss, id="plain"),
    pytest.param(CachedInfoNCELoss, CachedMultipleNegativesRankingLoss, id="cached"),
]


@pytest.fixture(scope="session")
def tiny64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("st") / "llama", dtype=torch.float64)


@pytest.fixture
def model(tiny64: Path) -> SentenceTransformer:
    """Mean pooling, so that embeddings have norms of their own; nothing is random in it."""
    transformer = Transformer(str(tiny64), model_kwargs={"dtype": torch.float64})
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    made = SentenceTransformer(modules=[transformer, pooling], device="cpu")
    compute_norms_in_float64(made)
    return made.train()


def texts(columns: int, rows: int = ROWS) -> list[list[str]]:
    """Columns of texts of 2 to 9 words, no two of them equal."""
    draw = np.random.default_rng(0)
    found: list[str] = []
    while len(found) < columns * rows:
        text = " ".join(draw.choice(WORDS, draw.integers(2, 10)))
        if text not in found:
            found.append(text)
    return [found[i * rows : (i + 1) * rows] for i in range(columns)]


def run(loss: Any, columns: Sequence[list[str]], prompt: str | None = None) -> tuple[Tensor, Any]:
    """Value of a loss and the gradients of its model."""
    loss.model.zero_grad()
    value = loss([loss.model.preprocess(column, prompt=prompt) for column in columns], None)
    value.backward()
    return value.detach(), gradients(loss.model)


def assert_alike(
    ours: Any, theirs: Any, columns: Sequence[list[str]], bound: float = EXACT
) -> None:
    (value, found), (wanted_value, wanted) = run(ours, columns), run(theirs, columns)
    assert value.dtype == torch.float64
    assert relative_error(value, wanted_value) < bound
    assert_same(found, wanted, bound)


# -- beside theirs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_as_theirs(
    model: SentenceTransformer, ours: Any, theirs: Any, columns: int, temperature: float
) -> None:
    batch = texts(columns)
    assert_alike(ours(model, temperature), theirs(model, scale=1 / temperature), batch)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize(
    ("options", "their_options"),
    [
        ({"softmaxes": "symmetric"}, {"directions": ALL[::2], "partition_mode": "per_direction"}),
        ({"softmaxes": GTE}, {"directions": ALL}),
        ({"softmaxes": "qwen3"}, {"directions": (ALL[0], ALL[1], ALL[3])}),
        ({"softmaxes": [["query_to_doc", Direction.DOC_TO_QUERY]]}, {"directions": ALL[::2]}),
        ({"hardness": Hardness(strength=9)}, {"hardness_mode": "all_negatives"}),
        (
            {"hardness": {"strength": 9, "on": "in-batch"}},
            {"hardness_mode": "in_batch_negatives"},
        ),
        (
            {"hardness": Hardness(strength=9, on=Negatives.HARD)},
            {"hardness_mode": "hard_negatives"},
        ),
    ],
)
def test_options_as_theirs(
    model: SentenceTransformer, ours: Any, theirs: Any, options: Any, their_options: Any
) -> None:
    batch = texts(4)
    if "hardness" in options:
        their_options = {**their_options, "hardness_strength": 9.0}
    plain, _ = run(ours(model), batch)
    assert relative_error(run(ours(model, **options), batch)[0], plain) > 1e-4, "does nothing"
    assert_alike(ours(model, **options), theirs(model, **their_options), batch)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_dot_products_as_theirs(model: SentenceTransformer, ours: Any, theirs: Any) -> None:
    from sentence_transformers.util import dot_score

    assert_alike(
        ours(model, 1.0, normalize=False), theirs(model, 1.0, similarity_fct=dot_score), texts(3)
    )


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_dropout_as_theirs(model: SentenceTransformer, ours: Any, theirs: Any) -> None:
    """Masks are drawn in the order in which theirs are, and the second pass draws the same."""
    batch = texts(3)
    still, _ = run(ours(model), batch)
    for layer in model[0].auto_model.layers:
        layer.self_attn.attention_dropout = 0.3
    found = []
    for loss in (ours(model), theirs(model)):
        torch.manual_seed(7)
        found.append(run(loss, batch))
    assert relative_error(found[0][0], still) > 1e-3, "dropout is off"
    assert relative_error(found[0][0], found[1][0]) < EXACT
    assert_same(found[0][1], found[1][1], EXACT)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_matryoshka_as_theirs(model: SentenceTransformer, ours: Any, theirs: Any) -> None:
    wrapped = (MatryoshkaLoss(model, loss(model), [64, 16], [1, 0.5]) for loss in (ours, theirs))
    assert_alike(*wrapped, texts(3))


@pytest.mark.parametrize("sizes", [{"mini_batch_size": 1}, {"mini_batch_num_tokens": 20}])
def test_mini_batches_change_nothing(model: SentenceTransformer, sizes: dict[str, int]) -> None:
    """Beside one mini-batch of all, and beside no mini-batches."""
    batch = texts(4)
    made: list[int] = []
    model[0].register_forward_pre_hook(lambda module, args: made.append(len(args[0]["input_ids"])))
    loss = CachedInfoNCELoss(model, softmaxes="gte", **sizes)
    value, found = run(loss, batch)
    assert len(made) > 2 * 4, "not cut into mini-batches"
    for whole in (
        CachedInfoNCELoss(model, softmaxes="gte"),
        InfoNCELoss(model, softmaxes="gte"),
    ):
        wanted_value, wanted = run(whole, batch)
        assert relative_error(value, wanted_value) < EXACT
        assert_same(found, wanted, REPLAYED)


@pytest.mark.parametrize("kind", [InfoNCELoss, CachedInfoNCELoss])
def test_without_gradients(model: SentenceTransformer, kind: Any) -> None:
    """As their trainer evaluates."""
    batch = texts(3)
    loss = kind(model)
    value, _ = run(loss, batch)
    with torch.no_grad():
        seen = loss([model.preprocess(column) for column in batch], None)
    assert not seen.requires_grad
    assert relative_error(seen, value) < EXACT


@pytest.mark.parametrize("kind", [InfoNCELoss, CachedInfoNCELoss])
def test_a_scaled_loss_has_scaled_gradients(model: SentenceTransformer, kind: Any) -> None:
    """As gradient accumulation and float16's scaler have it."""
    batch = texts(3)
    _, wanted = run(kind(model), batch)
    model.zero_grad()
    (kind(model)([model.preprocess(column) for column in batch], None) / 4).backward()
    assert_same(gradients(model), {name: gradient / 4 for name, gradient in wanted.items()}, EXACT)


# -- what theirs do not have -----------------------------------------------------------------------


def formula(model: SentenceTransformer, columns: Sequence[list[str]], **options: Any) -> Tensor:
    """The loss of triplets by its definition, texts told apart as our trainer does."""
    number = {text: i for i, text in enumerate(dict.fromkeys(chain(*columns)))}
    rows = [np.array([number[text] for text in column]) for column in columns]
    step = step_texts(
        RowTable(rows[0], rows[1], rows[2][:, None]),
        np.arange(len(rows[0])),
        hard_negatives="own" if options.pop("own_only", False) else "batch",
        mask_duplicates=options.pop("mask_duplicates", True),
        encode_twins_once=False,
        both_ways="softmaxes" in options,
    )
    if isinstance(hides := options.get("false_negatives"), dict):
        options["false_negatives"] = FalseNegatives(**hides)
    query, *docs = [model(model.preprocess(column))["sentence_embedding"] for column in columns]
    value, _ = reference_loss(
        query,
        torch.cat(docs),
        candidates_of(step),
        LossOptions(temperature=0.5, normalize=True, **options),
    )
    return value


@pytest.mark.parametrize("kind", [InfoNCELoss, CachedInfoNCELoss])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softmaxes": GTE},
        {"own_only": True},
        {"false_negatives": FalseNegatives(margin=-0.05)},  # does not hide copies by itself
        {"false_negatives": {"margin": -0.1, "relative": True}},
    ],
)
def test_duplicates_as_our_trainer_has_them(
    model: SentenceTransformer, kind: Any, options: Any
) -> None:
    """Copies of positives, of the anchor among documents, and of anchors; lengths differ.

    Besides, a positive of two anchors, one of which has two.
    """
    anchors, positives, negatives = texts(3)
    positives[3], positives[4] = positives[0], positives[7]
    negatives[5], negatives[6] = positives[1], anchors[2]
    anchors[8] = anchors[7]
    batch = [anchors, positives, negatives]
    if options:
        values = [run(kind(model, 0.5, **given), batch)[0] for given in (options, {})]
        assert relative_error(*values) > 1e-3, "the option does nothing"
    unmasked, _ = run(kind(model, 0.5, mask_duplicates=False, **options), batch)
    value, found = run(kind(model, 0.5, **options), batch)
    assert relative_error(value, unmasked) > 1e-3, "masks nothing"
    for masked, got in ((True, value), (False, unmasked)):
        wanted = formula(model, batch, mask_duplicates=masked, **options)
        assert relative_error(got, wanted.detach()) < EXACT
    model.zero_grad()
    formula(model, batch, **options).backward()
    assert_same(found, gradients(model), REPLAYED)


def test_a_prompt_is_part_of_a_text(model: SentenceTransformer) -> None:
    def keys(*prompts: str | None) -> list[list[int]]:
        columns = [
            model.preprocess(["the cat", "a big dog ran"], prompt=prompt) for prompt in prompts
        ]
        return text_keys(columns).tolist()

    assert keys("not ", "not ") == [[0, 1], [0, 1]]
    assert keys("not ", None) == [[0, 1], [2, 3]]


def test_texts_are_told_apart_without_their_padding() -> None:
    rows = [[5, 6, 7], [5], [5, 6, 7], [5, 6]]
    flat = torch.tensor([*chain(*rows)])
    ends = torch.tensor([len(row) for row in rows]).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])

    def padded(width: int, *, left: bool = False) -> dict[str, Any]:
        """Padding has an id that is a token's too."""
        gaps = [[5] * (width - len(row)) for row in rows]
        there = [[1] * len(row) for row in rows]
        none = [[0] * len(gap) for gap in gaps]
        first, second = ((gaps, rows), (none, there)) if left else ((rows, gaps), (there, none))
        return {
            "input_ids": torch.tensor([a + b for a, b in zip(*first, strict=True)]),
            "attention_mask": torch.tensor([a + b for a, b in zip(*second, strict=True)]),
        }

    same = [
        padded(3),
        padded(5),
        padded(4, left=True),
        {"input_ids": flat[None], "cu_seq_lens_q": starts.int(), "modality": "text"},
        {"input_ids": flat, "offsets": starts[:-1]},
    ]
    assert text_keys(same).tolist() == [[0, 1, 0, 2]] * len(same)
    assert text_keys([{"input_ids": torch.tensor([[5, 6], [6, 5]])}]).tolist() == [[0, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bit_embeddings_are_not_rounded(dtype: torch.dtype) -> None:
    """Most of these are below float16's range, which is there only once the loss is scaled."""
    draw = torch.Generator().manual_seed(0)
    emb = [torch.randn(8, 16, generator=draw).to(dtype) for _ in range(3)]
    loss = CachedInfoNCELoss(nn.Sequential(nn.Identity()), 2.0, mask_duplicates=False)

    def leaves(as_dtype: torch.dtype) -> list[list[Tensor]]:
        return [[x.detach().requires_grad_() for x in e.to(as_dtype).split(5)] for e in emb]

    got, exact = leaves(dtype), leaves(torch.float64)
    value = loss.calculate_loss(got, None, with_backward=True)
    wanted = loss.calculate_loss(exact, None, with_backward=False)
    wanted.backward()
    assert relative_error(value, wanted.detach()) < 1e-6
    for column, exact_column in zip(got, exact, strict=True):
        for leaf, exact_leaf in zip(column, exact_column, strict=True):
            assert leaf.grad is not None
            assert exact_leaf.grad is not None
            assert leaf.grad.dtype == torch.float32
            assert relative_error(leaf.grad, exact_leaf.grad) < 1e-5


class Given(nn.Module):
    """A model whose embeddings are a feature."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["sentence_embedding"]}


@pytest.mark.parametrize("kind", [InfoNCELoss, CachedInfoNCELoss])
@pytest.mark.parametrize("softmaxes", ["one_way", "gte"])
def test_no_matrix_is_held(kind: Any, softmaxes: str) -> None:
    rows = 512
    emb = [torch.randn(rows, 4, requires_grad=True) for _ in range(3)]
    model = nn.Sequential(Given())
    loss = kind(model, softmaxes=softmaxes, mask_duplicates=False, workspace_bytes=2**17)
    theirs = MultipleNegativesRankingLoss(model)
    peaks = []
    for one in (loss, theirs):
        with LiveBytes(known=emb) as live:
            one([{"sentence_embedding": x} for x in emb], None).backward()
        peaks.append(live.peak)
    matrix = 4 * rows * 2 * rows
    assert peaks[0] < matrix / 4 < matrix < peaks[1]


# -- in their trainer ------------------------------------------------------------------------------


def train(model: SentenceTransformer, loss: nn.Module, columns: int, folder: Path) -> Any:
    """Sixteen steps of half the rows; the trainer."""
    data = Dataset.from_dict(dict(zip(NAMES, texts(columns), strict=False)))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS // 2,
        per_device_eval_batch_size=ROWS,
        num_train_epochs=8,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        prompts={"anchor": "the man ran "},
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, loss=loss
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.seen = before, trainer.evaluate()["eval_loss"]
    return trainer


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("columns", [2, 3, 4])
def test_training_as_theirs(
    model: SentenceTransformer,
    tiny64: Path,
    tmp_path: Path,
    ours: Callable[..., nn.Module],
    theirs: Callable[..., nn.Module],
    columns: int,
) -> None:
    """The same losses, and the same weights at the end; what is saved embeds the same when loaded."""
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    weights, histories, seen = [], [], []
    for loss in (ours(model, temperature=0.1), theirs(model, scale=10)):
        model.load_state_dict(start)
        trainer = train(model, loss, columns, tmp_path / "run")
        weights.append({name: weight.clone() for name, weight in model.state_dict().items()})
        histories.append([x["loss"] for x in trainer.state.log_history if "loss" in x])
        seen.append(trainer.seen)
        if len(weights) == 1:
            model.save_pretrained(str(tmp_path / "saved"))
            wanted = model.encode(texts(1)[0])
    before, after = seen[0]
    assert after < 0.5 * before
    assert seen[0] == pytest.approx(seen[1], rel=1e-6)
    assert len(histories[0]) == 16
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)  # as logged, to four decimals
    for name, weight in weights[0].items():
        assert relative_error(weight, weights[1][name]) < 1e-6
    assert any(relative_error(weight, start[name]) > 1e-3 for name, weight in weights[0].items())
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    compute_norms_in_float64(loaded)
    assert np.abs(loaded.encode(texts(1)[0]) - wanted).max() < 1e-6
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert f"loss:{type(ours(model)).__name__}" in card
    assert '"temperature": 0.1' in card
    assert ("gao2021gradcache" in card) == (ours is CachedInfoNCELoss)
    assert "oord2018cpc" in card


# -- options and errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (InfoNCELoss, {}),
        (InfoNCELoss, {"softmaxes": "gte", "own_only": True, "mask_duplicates": False}),
        (InfoNCELoss, {"softmaxes": [["doc_to_query", "query_to_query"], ["query_to_doc"]]}),
        (
            CachedInfoNCELoss,
            {
                "temperature": 0.2,
                "false_negatives": FalseNegatives(margin=0.1, relative=True),
                "hardness": Hardness(strength=3, on=Negatives.HARD),
                "normalize": False,
                "products": "split-bf16",
                "workspace_bytes": 2**28,
                "mini_batch_size": 7,
                "mini_batch_num_tokens": 99,
            },
        ),
    ],
)
def test_a_loss_is_made_again_from_its_card(
    model: SentenceTransformer, kind: Any, options: Any
) -> None:
    loss = kind(model, **options)
    plain = json.loads(json.dumps(loss.get_config_dict()))
    assert options.keys() <= plain.keys()
    again = kind(model, **plain)
    assert again.get_config_dict() == plain == loss.get_config_dict()
    for name in plain:
        assert getattr(again, name) == getattr(loss, name), name
    if not options:
        assert plain["softmaxes"] == "one_way"
        assert loss.softmaxes == ONE_WAY


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature: got 0, wanted a finite number above 0, which is 1 / sc"),
        ({"softmaxes": "gtee"}, r"softmaxes: got 'gtee', wanted of \['one_way', .*query_to_doc"),
        ({"softmaxes": [["query_to_dog"]]}, r"softmaxes: got 'query_to_dog', wanted of \['query"),
        ({"softmaxes": []}, "softmaxes: got none, wanted at least one"),
        ({"hardness": {"power": 9}}, r"hardness: got .*wanted Hardness\(...\) or its fields"),
        ({"hardness": {"strength": 9, "on": "most"}}, r"hardness.on: got 'most', wanted of \['h"),
        ({"false_negatives": 0.1}, "false_negatives: got 0.1, wanted FalseNegatives"),
        (
            {"false_negatives": FalseNegatives(margin=torch.ones(4))},
            "false_negatives: got tensors, .* wanted a margin that is a number",
        ),
        ({"products": "tf32"}, r"products: got 'tf32', wanted of \['exact'"),
        ({"mini_batch_size": 0}, "mini_batch_size: got 0, wanted 1 or more"),
        ({"mini_batch_num_tokens": 0}, "mini_batch_num_tokens: got 0, wanted 1 or more"),
    ],
)
def test_wrong_options(model: SentenceTransformer, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CachedInfoNCELoss(model, **options)


@pytest.mark.parametrize("kind", [InfoNCELoss, CachedInfoNCELoss])
def test_wrong_columns(model: SentenceTransformer, kind: Any) -> None:
    (anchors,) = texts(1)
    loss = kind(model)
    with pytest.raises(ValueError, match=r"got 1 column of texts, wanted anchors, .*select_column"):
        loss([model.preprocess(anchors)], None)
    image = {"pixel_values": torch.ones(2, 3), "input_ids": torch.ones(2, 3), "modality": "image"}
    for what, column in (("image", image), ("no token ids", {"input_values": torch.ones(2, 3)})):
        message = f"mask_duplicates: got a column of {what}.* use mask_duplicates=False"
        with pytest.raises(ValueError, match=message):
            loss([column, column], None)


@pytest.mark.parametrize("kind", [InfoNCELoss, CachedInfoNCELoss])
def test_a_path_that_cannot_says_so(model: SentenceTransformer, kind: Any) -> None:
    with pytest.raises(ValueError, match="products: got split-bf16"):
        run(kind(model, products="split-bf16"), texts(2))


def test_static_embeddings(model: SentenceTransformer) -> None:
    """Their flat batches are told apart, but not cut into mini-batches."""
    static = SentenceTransformer(
        modules=[StaticEmbedding(model.tokenizer, embedding_dim=16)], device="cpu"
    )
    batch = texts(3)
    (value, found), (wanted_value, wanted) = (
        run(loss, batch) for loss in (InfoNCELoss(static), MultipleNegativesRankingLoss(static))
    )
    assert relative_error(value, wanted_value) < 1e-5
    assert_same(found, wanted, 1e-5)
    with pytest.raises(ValueError, match=r"StaticEmbedding.*use InfoNCELoss"):
        CachedInfoNCELoss(static)


@pytest.mark.parametrize(
    ("version", "got"),
    [(None, "no sentence-transformers"), ("5.6.0", "sentence-transformers 5.6.0")],
)
def test_without_the_library(
    monkeypatch: pytest.MonkeyPatch, version: str | None, got: str
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setitem(sys.modules, "sentence_transformers.base.losses", None)
    monkeypatch.delitem(sys.modules, MODULE)
    message = rf"^got {got} \(.*\), wanted 6\.0 or newer.*pip install"
    with pytest.raises(ImportError, match=message):
        importlib.import_module(MODULE)


def test_the_package_imports_nothing() -> None:
    code = (
        "import sys; import lowmem_cft.integrations;"
        "print([m for m in ('torch', 'sentence_transformers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
