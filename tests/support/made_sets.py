"""Small data sets of every protocol, written or made up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lowmem_cft.evaluation.transfer.tasks import Split, TaskSpec, TransferTask
from lowmem_cft.inference.embed import Vectors


def write_tsv(path: Path, listed: Sequence[tuple[str, str, float]], subset: str = "one") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{subset}\t{a}\t{b}\t{score}" for a, b, score in listed]
    path.write_text("\n".join(["subset\tsentence1\tsentence2\tscore", *lines, ""]))
    return path


def make_task(sizes: dict[str, int], num_classes: int = 2, pairs: bool = False) -> TransferTask:
    """Texts that name themselves; every row of a class has a vector around its centre."""
    spec = TaskSpec("made", sizes, tuple(map(str, range(num_classes))), pairs)
    draw = np.random.default_rng(5)
    splits = {
        name: Split(
            [f"{name} {i}" for i in range(size)],
            [f"{name} other {i}" for i in range(size)] if pairs else [],
            draw.integers(0, num_classes, size),
        )
        for name, size in sizes.items()
    }
    return TransferTask(spec, splits, {"made.tsv": "0" * 64})


class Lookup:
    """An embedder that knows the labels, vaguely."""

    def __init__(self, task: TransferTask, size: int = 8, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        centre_KD = draw.normal(size=(len(task.spec.classes), size)) * 0.7
        self.calls: list[list[str]] = []
        self.vector: dict[str, Vectors] = {}
        for split in task.splits.values():
            noise_ND = draw.normal(size=(len(split.texts), size))
            for text, label, noise_D in zip(split.texts, split.label_N, noise_ND, strict=True):
                self.vector[text] = (centre_KD[label] + noise_D).astype(np.float32)
            # the second of a pair is near the first where the label is 1
            for text, first, label in zip(split.texts2, split.texts, split.label_N, strict=False):
                near = self.vector[first] * (1.0 if label else 0.4)
                self.vector[text] = (near + 0.5 * draw.normal(size=size)).astype(np.float32)

    def __call__(self, texts: Sequence[str]) -> Vectors:
        self.calls.append(list(texts))
        return np.stack([self.vector[text] for text in texts])
