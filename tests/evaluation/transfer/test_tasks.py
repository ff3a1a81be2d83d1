"""Reading the transfer tasks: SentEval's order of rows and classes, sizes, and bad files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from lowmem_cft.evaluation.transfer import tasks as transfer_data
from lowmem_cft.evaluation.transfer.tasks import SPECS, TaskSpec, load_tasks


@pytest.fixture
def small_specs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of a few rows under the real names."""
    small = (
        TaskSpec("CR", {"all": 6}),
        TaskSpec("SUBJ", {"all": 6}, classes=("1", "0")),
        TaskSpec("TREC", {"train": 3, "test": 1}, classes=("ABBR", "DESC"), removed="'`"),
        TaskSpec("MRPC", {"train": 3, "test": 1}, pairs=True),
    )
    monkeypatch.setattr(transfer_data, "SPECS", {spec.name: spec for spec in small})


def write(folder: Path, file: str, *lines: str) -> Path:
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


REVIEWS = (
    "label\ttext",
    "1\tgood  one .",
    "1\tgreat",
    "1\tfine",
    "0\tbad",
    "0\tso bad .",
    "0\tno !",
)


@pytest.mark.usefixtures("small_specs")
def test_rows_are_sorted_by_tokens_then_class_and_keep_the_order_of_the_file(
    tmp_path: Path,
) -> None:
    file = write(tmp_path, "CR/CR.tsv", *REVIEWS)
    write(tmp_path, "SUBJ/SUBJ.tsv", *REVIEWS)
    reviews, swapped = load_tasks(tmp_path, ["CR", "SUBJ"])
    assert reviews.splits["all"].texts == ["bad", "great", "fine", "no !", "so bad .", "good one ."]
    assert reviews.splits["all"].label_N.tolist() == [0, 1, 1, 0, 0, 1]
    assert reviews.checksums == {"CR/CR.tsv": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert reviews.splits["all"].texts2 == []
    # the other numbering of the classes changes which of equally long rows comes first
    assert swapped.splits["all"].texts == ["great", "fine", "bad", "no !", "good one .", "so bad ."]
    assert swapped.splits["all"].label_N.tolist() == [0, 0, 1, 1, 0, 1]


@pytest.mark.usefixtures("small_specs")
def test_quotes_are_deleted_where_senteval_deletes_them(tmp_path: Path) -> None:
    rows = ("DESC\tWhat 's `` it '' ?", "ABBR\tO.K. ' meaning", "DESC\tWhy ?")
    write(tmp_path, "TREC/TREC-train.tsv", "label\ttext", *rows)
    write(tmp_path, "TREC/TREC-test.tsv", "label\ttext", "ABBR\t`NASA' ?")
    (task,) = load_tasks(tmp_path, ["TREC"])
    assert task.splits["train"].texts == ["O.K. meaning", "Why ?", "What s it ?"]
    assert task.splits["train"].label_N.tolist() == [0, 1, 1]
    assert task.splits["test"].texts == ["NASA ?"]
    assert list(task.checksums) == ["TREC/TREC-train.tsv", "TREC/TREC-test.tsv"]


@pytest.mark.usefixtures("small_specs")
def test_pairs_are_sorted_by_both_lengths_then_class(tmp_path: Path) -> None:
    rows = ("1\ta b\tc d", "0\ta b\tit 's", "1\tx y\tz")
    write(tmp_path, "MRPC/MRPC-train.tsv", "label\ttext\ttext2", *rows)
    write(tmp_path, "MRPC/MRPC-test.tsv", "label\ttext\ttext2", "0\tone\ttwo")
    (task,) = load_tasks(tmp_path, ["MRPC"])
    train = task.splits["train"]
    assert train.texts == ["x y", "a b", "a b"]
    assert train.texts2 == ["z", "it 's", "c d"]
    assert train.label_N.tolist() == [1, 0, 1]


@pytest.mark.usefixtures("small_specs")
def test_a_limit_takes_rows_from_all_of_the_file(tmp_path: Path) -> None:
    write(tmp_path, "CR/CR.tsv", *REVIEWS)
    (task,) = load_tasks(tmp_path, ["CR"], limit=2)
    assert task.splits["all"].texts == ["bad", "good one ."]  # the first of each half
    assert task.limit == 2
    with pytest.raises(ValueError, match="limit: got 0, wanted at least 1 row"):
        load_tasks(tmp_path, ["CR"], limit=0)


def test_unknown_task_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"transfer task 'SST5': none of MR, CR, .*MRPC"):
        load_tasks(tmp_path, ["MR", "SST5"])
    with pytest.raises(ValueError, match=r"set LOWMEM_CFT_DATA .* holds MR/MR.tsv, TREC/TREC-tr"):
        load_tasks(None, ["MR", "TREC"])


def test_every_missing_file_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    write(tmp_path, "TREC/TREC-train.tsv", "label\ttext")
    with pytest.raises(ValueError, match=r"lacks MR/MR\.tsv, TREC/TREC-test\.tsv; make") as caught:
        load_tasks(tmp_path, ["MR", "TREC"])
    assert str(tmp_path) in str(caught.value)
    assert "https://github.com/facebookresearch/SentEval" in str(caught.value)


@pytest.mark.usefixtures("small_specs")
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (REVIEWS[:-1], "got 5 rows, CR has 6 there"),
        ((*REVIEWS, "0\tnot this"), "got 7 rows, CR has 6 there"),
        ((*REVIEWS[:3], "2\tfine"), "line 4: got label '2', wanted 0, 1"),
        ((*REVIEWS[:3], "1\t "), "line 4: blank text; remove the row"),
        ((*REVIEWS[:3], "1"), "line 4: wrong number of cells"),
        (("label\tsentence", *REVIEWS[1:]), "no column 'text'"),
        ((), "the file is empty"),
    ],
)
def test_bad_files(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    file = write(tmp_path, "CR/CR.tsv", *lines)
    with pytest.raises(ValueError, match=message) as caught:
        load_tasks(tmp_path, ["CR"])
    assert str(caught.value).startswith(str(file))


def test_the_real_tasks(data_folder: Path) -> None:
    present = [name for name in SPECS if (data_folder / name).is_dir()]
    if not present:
        pytest.skip(f"{data_folder} holds no transfer task")
    for task in load_tasks(data_folder, present):
        for name, split in task.splits.items():
            assert len(split.texts) == len(split.label_N) == SPECS[task.name].splits[name]
            assert len(split.texts2) == (len(split.texts) if task.name == "MRPC" else 0)
            rows_of_class = np.bincount(split.label_N, minlength=len(SPECS[task.name].classes))
            assert rows_of_class.all(), (task.name, name)
            lengths = [len(text.split()) for text in split.texts]
            assert lengths == sorted(lengths)
            assert lengths[0] < lengths[-1]
