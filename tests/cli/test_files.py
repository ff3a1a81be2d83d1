"""Files that commands read and write."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from lowmem_cft.cli.files import read_lines
from lowmem_cft.inference import loading
from running import Run


def test_unwritable_output(command: Run, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = command("train", str(recipe_file), "--set", f"output.folder={tmp_path / 'file'}")
    assert code == 2
    assert "output.folder" in err


def test_embed_names_the_empty_line(command: Run, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("one\n\nthree\n")
    code, _, err = command("embed", "anything", str(texts))
    assert code == 2
    assert "line 2" in err


def test_embed_cuts_at_line_ends_only(command: Run, finished: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_bytes("\ufeffthe cat\u2028sat\r\na dog\n".encode())
    code, _, err = command("embed", str(finished), str(texts))
    assert code == 0, err
    assert np.load(tmp_path / "texts.txt.npy").shape[0] == 2


def test_embed_writes_no_vectors_that_are_no_numbers(
    command: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the cat\na dog\nrain\n")
    vectors = np.ones((3, 4), dtype=np.float32)
    vectors[1, 2] = np.nan
    monkeypatch.setattr(loading, "embed_texts", lambda *args, **kwargs: vectors)
    code, _, err = command("embed", str(finished), str(texts))
    assert code == 2
    assert "1 of 3 embeddings are not finite" in " ".join(err.split())
    assert not (tmp_path / "texts.txt.npy").exists()


def test_standard_input_is_embedded(
    command: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Piped:
        buffer = io.BytesIO(b"the cat sat\na dog ran\n")

    monkeypatch.setattr("sys.stdin", Piped())
    code, _, err = command("embed", str(finished), "-", "--out", str(tmp_path / "v.npy"))
    assert code == 0, err
    assert np.load(tmp_path / "v.npy").shape[0] == 2
    code, _, err = command("embed", str(finished), "-")
    assert code == 2
    assert "--out: wanted a file" in err


def test_blank_lines_are_kept_by_choice(command: Run, finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("the cat sat\n\na dog ran\n   \n")
    code, _, err = command("embed", str(finished), str(file))
    assert code == 2
    assert "texts.txt, line 2: empty; " in err
    assert "--keep-blank" in err
    code, _, err = command("embed", str(finished), str(file), "--keep-blank")
    assert code == 0, err
    vectors = np.load(tmp_path / "texts.txt.npy")
    assert vectors.shape[0] == 4
    assert np.isfinite(vectors).all()


def test_a_folder_is_no_file_of_texts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder, wanted a file with a text a line"):
        read_lines(tmp_path)
