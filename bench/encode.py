"""Embedding the nine STS sets beside sentence-transformers, and a shared prefix on and off.

    python bench/encode.py            # all sentences, three rounds: hours on two CPU cores
    python bench/encode.py --quick    # a sample, one round, under 50 seconds, and noisier

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
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowmem_cft.data.tokens import TextFormat, Tokenizer
from lowmem_cft.evaluation.search.demonstrations import PROMPTEOL, SHIPPED, read_demonstrations
from lowmem_cft.evaluation.sts.protocols import PROTOCOLS, sets_in
from lowmem_cft.evaluation.sts.sets import data_folder, load_set
from lowmem_cft.exporting.tokenizer import prepared_tokenizer
from lowmem_cft.inference.embed import Vectors, embed_texts
from lowmem_cft.machine import choose_device, keep_freed_memory
from lowmem_cft.model import sources
from lowmem_cft.model.backbone import Backbone, load_backbone, quiet_libraries
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.recipe.schema import ModelSection
from measure import machine, median, print_line, synchronize, versions

NINE = [entry.name for entry in PROTOCOLS["mteb"].sets]
DEV = "STSBenchmark-dev"
DEMONSTRATION_TOKENS = 20
_NO_LIMIT = 4096  # tokens: neither side cuts any sentence of the sets
_QUICK_TEXTS, _QUICK_PREFIX_TEXTS = 120, 150
_WARM_UP = 24
"""Texts: enough that a prefix is shared, and tried out, before anything is timed."""
_BATCH_SAMPLE = 512

Side = Callable[[list[str]], Vectors]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def sentences(names: Sequence[str], distinct: int | None) -> dict[str, list[str]]:
    """The sentences of each set, both columns; of all sets together about so many distinct ones."""
    folder = data_folder()
    found = {}
    for name in names:
        pairs = load_set(name, folder, offline=True).pairs
        found[name] = [pair.sentence1 for pair in pairs] + [pair.sentence2 for pair in pairs]
    total = sum(len(set(texts)) for texts in found.values())
    if distinct is None or distinct >= total:
        return found
    draw = np.random.default_rng(0)
    for name, texts in found.items():
        once = list(dict.fromkeys(texts))
        number = max(2, round(distinct * len(once) / total))
        kept = {once[i] for i in draw.permutation(len(once))[:number]}
        found[name] = [text for text in texts if text in kept]
    return found


def sentence_transformer(backbone: Backbone, text_format: TextFormat, folder: Path) -> Any:
    """The same weights and tokens as a SentenceTransformer; `folder` is empty, for its files."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import (
        Normalize,
        Pooling,
        Transformer,
    )

    source = Path(backbone.name)
    for file in (source / "config.json", *source.glob("model*.safetensors*")):
        (folder / file.name).symlink_to(file.resolve())  # no chat template: it would be applied
    prepared_tokenizer(backbone.tokenizer, text_format).save_pretrained(folder)
    first = Transformer(str(folder), model_kwargs={"dtype": backbone.dtype})
    pooling = Pooling(backbone.model.config.hidden_size, pooling_mode="lasttoken")
    device = str(backbone.model.device)
    return SentenceTransformer(modules=[first, pooling, Normalize()], device=device)


def seconds(side: Side, texts: list[str], device: torch.device) -> tuple[float, Vectors]:
    synchronize(device)
    start = time.perf_counter()
    vectors = side(texts)
    synchronize(device)
    return time.perf_counter() - start, vectors


def fastest_batch(model: Any, sizes: Sequence[int], texts: list[str], device: torch.device) -> int:
    """sentence-transformers' batch size that takes least on a sample, each tried twice."""
    if len(sizes) == 1:
        return sizes[0]
    taken = {size: float("inf") for size in sizes}
    for _ in range(2):
        for size in sizes:
            side = partial(model.encode, batch_size=size, show_progress_bar=False)
            taken[size] = min(taken[size], seconds(side, texts, device)[0])
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
        turn = index % len(names)
        for name, texts in sets.items():
            vectors = {}
            for side in names[turn:] + names[:turn]:
                taken, vectors[side] = seconds(sides[side], texts, device)
                times.setdefault((name, side), []).append(taken)
                say(f"round {index + 1}/{rounds}  {name}  {side}  {taken:.1f} s")
            one, other = (vectors[side] for side in names)
            apart[name] = max(apart[name], float(np.abs(one - other).max()))
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

    def length(before: str) -> int:
        return len(tokenizer(before, add_special_tokens=False)["input_ids"])

    befores = [
        one.before(PROMPTEOL).removesuffix(PROMPTEOL) for one in read_demonstrations(SHIPPED)
    ]
    chosen = min(befores, key=lambda before: abs(length(before) - DEMONSTRATION_TOKENS))
    return chosen + PROMPTEOL, length(chosen)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a sample of the sentences")
    parser.add_argument("--rounds", type=int, help="3; 1 with --quick")
    parser.add_argument("--model", default=sources.EMBEDDED, help="embedded default, or a folder")
    parser.add_argument("--texts", type=int, help="about so many distinct sentences of all sets")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64, 128])
    options = parser.parse_args(argv)
    distinct, prefix_distinct = options.texts, options.texts
    if options.quick:
        distinct, prefix_distinct = _QUICK_TEXTS, _QUICK_PREFIX_TEXTS
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds: got {options.rounds}, wanted at least 1")
    rounds = options.rounds or (1 if options.quick else 3)
    quiet_libraries()
    keep_freed_memory()  # for both sides: else the C library's page faults are measured too
    folder = data_folder()
    here = sets_in(folder) if folder is not None else []
    sets = sentences([name for name in NINE if name in here] or ["demo"], distinct)
    dev = sentences([DEV if DEV in here else "demo"], prefix_distinct)

    device = choose_device()
    section = ModelSection(id=options.model, quantization="none", dtype="fp32")
    backbone = load_backbone(section, device, say)
    encoder = Encoder(backbone.model, pooling="last", normalize=True)
    ours = partial(embed_texts, encoder, backbone.tokenizer)
    sizes = [32] if options.quick else options.batch_sizes
    batch, rows = beside_st(backbone, ours, sets, sizes, rounds)
    tokens, prefix_rows = prefix_on_and_off(backbone, ours, dev, rounds)
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
            "rounds": rounds,
            "rows": rows,
            "prefix_rows": prefix_rows,
            "model": options.model,
            "machine": machine(device),
            "versions": versions(),
        }
    )
    return 0


def beside_st(
    backbone: Backbone,
    ours: Callable[..., Vectors],
    sets: dict[str, list[str]],
    sizes: Sequence[int],
    rounds: int,
) -> tuple[int, list[dict[str, Any]]]:
    """sentence-transformers' batch size, and the rows of `compare`."""
    device = backbone.model.device
    plain = TextFormat("{text}", append_eos=True, max_tokens=_NO_LIMIT)
    with tempfile.TemporaryDirectory() as place:
        st = sentence_transformer(backbone, plain, Path(place))
        sample = [text for texts in sets.values() for text in dict.fromkeys(texts)]
        drawn = np.random.default_rng(1).permutation(len(sample))[:_BATCH_SAMPLE]
        batch = fastest_batch(st, sizes, [sample[i] for i in drawn], device)
        sides: dict[str, Side] = {
            "st": partial(st.encode, batch_size=batch, show_progress_bar=False),
            "ours": lambda texts: ours(texts, plain),
        }
        return batch, compare(sides, sets, rounds, device)


def prefix_on_and_off(
    backbone: Backbone, ours: Callable[..., Vectors], dev: dict[str, list[str]], rounds: int
) -> tuple[int, list[dict[str, Any]]]:
    """The demonstration's tokens, and the rows of `compare`.

    Raises:
        RuntimeError: the prefix was not shared.
    """
    template, tokens = demonstrated(backbone.tokenizer)
    under = TextFormat(template, append_eos=False, max_tokens=_NO_LIMIT)
    sides: dict[str, Side] = {
        "each": lambda texts: ours(texts, under, share_prefix=False),
        "once": lambda texts: ours(texts, under, say=_refuse),
    }
    rows = compare(sides, dev, rounds, backbone.model.device)
    # rounding always tells the two apart; where sharing would save nothing it is left without a word
    if not any(row["max_abs_diff"] for row in rows):
        raise RuntimeError("no prefix was shared: take more --texts")
    return tokens, rows


def _refuse(reason: str) -> None:
    """A prefix that is not shared would be measured against itself."""
    raise RuntimeError(reason)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
