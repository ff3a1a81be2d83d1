"""Embedding the nine STS sets beside sentence-transformers, and a shared prefix on and off.

    python -m bench.encode            # all sentences, three rounds: hours on two CPU cores
    python -m bench.encode --quick    # a sample, one round, under 50 seconds, and noisier

The nine sets are mteb's, from the folder that LOWMEM_CFT_DATA names; without it the embedded pairs.
Both sides have the same weights (SmolLM2-135M in float32), the same tokens (the text and the
end-of-sequence token, which is read) and one process. A set is one call with all its sentences in
both columns, as an evaluator makes it:

st       SentenceTransformer.encode, in the fastest of --batch-sizes on a sample (--quick: in 32)
ours     embed_texts as `lowmem-cft embed` and `eval` call it

The sides take turns at going first, after both have embedded a few long texts; a set's time is the
median over the rounds, and `speedup` is the ratio of the sums over the sets. `prefix_speedup` compares embed_texts with itself on STS-B dev
(else the embedded pairs) under PromptEOL's template with a demonstration of 20 tokens (its template, sentence and word), the
tokens that texts begin with run in every text and run once.

The last line of standard output is one line of JSON. `max_abs_diff` and `prefix_max_abs_diff` are
the largest difference between two sides in any number of any normalised embedding. A sample is of
distinct sentences, with every occurrence of each in its set.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.device import timed
from bench.harness import in_turn, machine, median, print_line, say, versions
from bench.peers import base_in_st
from lowmem_cft.data.tokens import TextFormat, Tokenizer
from lowmem_cft.evaluation.search.demonstrations import PROMPTEOL, SHIPPED, read_demonstrations
from lowmem_cft.evaluation.sts.protocols import PROTOCOLS, sets_in
from lowmem_cft.evaluation.sts.sets import data_folder, load_set
from lowmem_cft.inference.embed import Vectors, embed_texts
from lowmem_cft.machine import choose_device, keep_freed_memory
from lowmem_cft.model import sources
from lowmem_cft.model.backbone import find_backbone, load_backbone, quiet_libraries
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.recipe.schema import ModelSection

NINE = [entry.name for entry in PROTOCOLS["mteb"].sets]
DEV = "STSBenchmark-dev"
DEMONSTRATION_TOKENS = 20
_NO_LIMIT = 4096  # tokens: neither side cuts any sentence of the sets
PLAIN = TextFormat("{text}", append_eos=True, max_tokens=_NO_LIMIT)
_QUICK_TEXTS, _QUICK_PREFIX_TEXTS = 120, 150
_WARM_UP = 24
"""Texts: enough that a prefix is shared, and tried out, before anything is timed."""
_BATCH_SAMPLE = 512

Side = Callable[[list[str]], Vectors]


def sentences(names: Sequence[str], distinct: int | None) -> dict[str, list[str]]:
    """The sentences of each set, both columns; of all sets together about so many distinct ones."""
    folder = data_folder()
    by_set: dict[str, list[str]] = {}
    for name in names:
        pairs = load_set(name, folder, offline=True).pairs
        by_set[name] = [pair.sentence1 for pair in pairs] + [pair.sentence2 for pair in pairs]
    total = sum(len(set(texts)) for texts in by_set.values())
    if distinct is None or distinct >= total:
        return by_set
    draw = np.random.default_rng(0)
    for name, texts in by_set.items():
        once = list(dict.fromkeys(texts))
        number = max(2, round(distinct * len(once) / total))
        sample = {once[i] for i in draw.permutation(len(once))[:number]}
        by_set[name] = [text for text in texts if text in sample]
    return by_set


def sampled(sets: dict[str, list[str]], count: int) -> list[str]:
    """At most so many of the sentences, each set's taken once."""
    texts = [text for texts in sets.values() for text in dict.fromkeys(texts)]
    drawn = np.random.default_rng(1).permutation(len(texts))[:count]
    return [texts[i] for i in drawn]


def fastest_batch(model: Any, sizes: Sequence[int], texts: list[str], device: torch.device) -> int:
    """sentence-transformers' batch size that takes least on a sample, each tried twice."""
    if len(sizes) == 1:
        return sizes[0]
    taken = {size: float("inf") for size in sizes}
    for _ in range(2):
        for size in sizes:
            side = partial(model.encode, texts, batch_size=size, show_progress_bar=False)
            taken[size] = min(taken[size], timed(side, device)[0])
    say(f"sentence-transformers, seconds by batch size: {taken}")
    return min(taken, key=lambda size: taken[size])


def compare(
    sides: dict[str, Side], sets: dict[str, list[str]], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row a set: median seconds of both sides, and how far their embeddings are apart."""
    warm_up = sorted(next(iter(sets.values())), key=len)[-_WARM_UP:]
    for run in sides.values():
        run(warm_up)
    times: dict[tuple[str, str], list[float]] = {}
    apart = dict.fromkeys(sets, 0.0)
    names = list(sides)
    for index in range(rounds):
        for name, texts in sets.items():
            vectors = {}
            for side in in_turn(names, index):
                taken, vectors[side] = timed(partial(sides[side], texts), device)
                times.setdefault((name, side), []).append(taken)
                say(f"round {index + 1}/{rounds}  {name}  {side}  {taken:.1f} s")
            first, second = (vectors[side] for side in names)
            apart[name] = max(apart[name], float(np.abs(first - second).max()))
    return [
        {"set": name, "texts": len(texts), "distinct": len(set(texts))}
        | {f"{side}_s": round(median(times[name, side]), 4) for side in names}
        | {"max_abs_diff": apart[name]}
        for name, texts in sets.items()
    ]


def total(rows: Sequence[dict[str, Any]], key: str) -> float:
    return float(sum(row[key] for row in rows))


def demonstrated(tokenizer: Tokenizer) -> tuple[str, int]:
    """PromptEOL's template with the shipped demonstration nearest to 20 tokens, and its tokens."""

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    prefixes = [
        demonstration.before(PROMPTEOL).removesuffix(PROMPTEOL)
        for demonstration in read_demonstrations(SHIPPED)
    ]
    chosen = min(prefixes, key=lambda prefix: abs(length(prefix) - DEMONSTRATION_TOKENS))
    return chosen + PROMPTEOL, length(chosen)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options, with what `--quick` makes of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a sample of the sentences")
    parser.add_argument("--rounds", type=int, help="3; 1 with --quick")
    parser.add_argument("--model", default=sources.EMBEDDED, help="embedded default, or a folder")
    parser.add_argument("--texts", type=int, help="about so many distinct sentences of all sets")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64, 128])
    options = parser.parse_args(argv)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds: got {options.rounds}, wanted at least 1")
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.prefix_texts = options.texts
    if options.quick:
        options.batch_sizes = [32]
        options.texts, options.prefix_texts = _QUICK_TEXTS, _QUICK_PREFIX_TEXTS
    return options


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    quiet_libraries()
    keep_freed_memory()  # for both sides: else the C library's page faults are measured too
    folder = data_folder()
    here = sets_in(folder) if folder is not None else []
    sets = sentences([name for name in NINE if name in here] or ["demo"], options.texts)
    dev = sentences([DEV if DEV in here else "demo"], options.prefix_texts)

    device = choose_device()
    section = ModelSection(id=options.model, quantization="none", dtype="fp32")
    source = find_backbone(section, say)
    backbone = load_backbone(section, device, say, source)
    encoder = Encoder(backbone.model, pooling="last", normalize=True)
    ours = partial(embed_texts, encoder, source.tokenizer)
    with tempfile.TemporaryDirectory() as place:
        st = base_in_st(section, source, PLAIN, device, Path(place) / "st", normalize=True)
        batch = fastest_batch(st, options.batch_sizes, sampled(sets, _BATCH_SAMPLE), device)
        sides: dict[str, Side] = {
            "st": partial(st.encode, batch_size=batch, show_progress_bar=False),
            "ours": lambda texts: ours(texts, PLAIN),
        }
        rows = compare(sides, sets, options.rounds, device)
    tokens, prefix_rows = prefix_on_and_off(ours, source.tokenizer, dev, options.rounds, device)
    print_line(
        {
            "speedup": round(total(rows, "st_s") / total(rows, "ours_s"), 3),
            "max_abs_diff": max(row["max_abs_diff"] for row in rows),
            "prefix_speedup": round(total(prefix_rows, "each_s") / total(prefix_rows, "once_s"), 3),
            "prefix_max_abs_diff": max(row["max_abs_diff"] for row in prefix_rows),
            "demonstration_tokens": tokens,
            "texts": int(total(rows, "texts")),
            "distinct": int(total(rows, "distinct")),
            "st_batch": batch,
            "rounds": options.rounds,
            "rows": rows,
            "prefix_rows": prefix_rows,
            "model": options.model,
            "machine": machine(device),
            "versions": versions(),
        }
    )
    return 0


def prefix_on_and_off(
    ours: Callable[..., Vectors],
    tokenizer: Tokenizer,
    dev: dict[str, list[str]],
    rounds: int,
    device: torch.device,
) -> tuple[int, list[dict[str, Any]]]:
    """The demonstration's tokens, and the rows of `compare`.

    Raises:
        RuntimeError: the prefix was not shared.
    """
    template, tokens = demonstrated(tokenizer)
    under = TextFormat(template, append_eos=False, max_tokens=_NO_LIMIT)
    sides: dict[str, Side] = {
        "each": lambda texts: ours(texts, under, share_prefix=False),
        "once": lambda texts: ours(texts, under, say=_refuse),
    }
    rows = compare(sides, dev, rounds, device)
    # rounding always tells the two apart; where sharing would save nothing it is left without a word
    if not any(row["max_abs_diff"] for row in rows):
        raise RuntimeError("no prefix was shared: take more --texts")
    return tokens, rows


def _refuse(reason: str) -> None:
    """A prefix that is not shared would be measured against itself."""
    raise RuntimeError(reason)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
