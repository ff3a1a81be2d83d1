"""What the dtype of embeddings costs the loss's gradient: relative errors, nothing is timed.

    python -m bench.embedding_dtype           # minutes on a CPU
    python -m bench.embedding_dtype --quick   # seconds: 256 x 512, D 576, drawn embeddings alone

M queries choose among N documents of unit norm and D numbers, the first M being their positives;
`one_way` or `symmetric` softmaxes. G is d loss / d similarity, d query = G doc, d doc = G^T query.
Errors are those of a gradient as one vector, relative to float64 from the same float32 embeddings:

yardstick   G rounded to bfloat16, everything else exact
split       `Products.SPLIT_BF16`: logits from three products of bfloat16 halves, G rounded to
            bfloat16, multiplied by both halves
split_high  G multiplied by the high halves alone
bf16        embeddings rounded to bfloat16, G too
fp16        embeddings rounded to float16, G too after it was scaled into float16's range
fp32        all of it in float32

Products of rounded numbers are exact here and summed in float64: a GPU's float32 sums add about
1e-7. G is rounded once, as where the loss takes two passes.

Embeddings are `drawn`: 0.3 of a document's squared norm is a direction that all share, 0.3 that of
one of 32 topics, the rest its own, so that documents of a topic have a cosine of about 0.6 and
others of 0.3; a query has one of 0.6 to 0.9, evenly spread, with its positive, and is otherwise like
a document of that topic. `apart` are the same without the shared direction and with 0.4 for the
topic. `model` are the embedded model's, untuned, of NLI triplets from the folder that
LOWMEM_CFT_DATA names (left out without it): anchors, then positives and negatives.

The last line of standard output is one line of JSON: `bf16_from` is the lowest temperature tried at
which, and at all above it, embeddings in bfloat16 make at most twice the yardstick's error in both
gradients of both softmaxes, by kind and D; None where there is none. `split_ratio` and
`split_high_ratio` are the greatest of their errors by the yardstick's, over all rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import machine, print_line, say, versions
from lowmem_cft.evaluation.sts.sets import data_folder
from lowmem_cft.model import sources

TEMPERATURES = (0.01, 0.02, 0.03, 0.05, 0.1)
SIZE, QUICK_SIZE = (1024, 2048), (256, 512)
WIDTHS = (576, 2304)
MODES = ("one_way", "symmetric")
KINDS = {"drawn": (0.3, 0.3), "apart": (0.0, 0.4)}
"""Parts of a document's squared norm: what all documents share, and what its topic does."""

_TRIPLETS = "nli/nli_triplets_20k.tsv.gz"
_TOPICS = 32
_FP16_RANGE = 2.0**13

Gradients = tuple[Tensor, Tensor]
"""Gradients of queries (M, D) and of documents (N, D)."""


@dataclass(frozen=True)
class Batch:
    """Unit vectors (M, D) and (N, D), float32; document i is query i's positive."""

    kind: str
    query_MD: Tensor
    doc_ND: Tensor


def drawn(kind: str, size: tuple[int, int], width: int) -> Batch:
    """See the module; drawn anew, and the same in every run."""
    num_queries, num_docs = size
    draw = torch.Generator().manual_seed(width)
    shared, topical = KINDS[kind]

    def directions(count: int) -> Tensor:
        x_CD = torch.randn(count, width, generator=draw, dtype=torch.float64)
        return F.normalize(x_CD, dim=1)

    shared_1D, topic_TD = directions(1), directions(_TOPICS)
    topic_N = torch.randint(_TOPICS, (num_docs,), generator=draw)

    def texts(topics: Tensor) -> Tensor:
        own_CD = directions(len(topics))
        parts = shared**0.5 * shared_1D, topical**0.5 * topic_TD[topics]
        return F.normalize(sum(parts) + (1 - shared - topical) ** 0.5 * own_CD, dim=1)

    doc_ND, other_MD = texts(topic_N), texts(topic_N[:num_queries])
    positive_MD = doc_ND[:num_queries]
    along_M1 = (other_MD * positive_MD).sum(dim=1, keepdim=True)
    across_MD = F.normalize(other_MD - along_M1 * positive_MD, dim=1)
    share_M1 = torch.rand(num_queries, 1, generator=draw, dtype=torch.float64)
    cosine_M1 = 0.6 + 0.3 * share_M1
    query_MD = cosine_M1 * positive_MD + (1 - cosine_M1**2).sqrt() * across_MD
    return Batch(kind, query_MD.float(), doc_ND.float())


def of_model(num_queries: int) -> Batch | None:
    """The embedded model's of as many triplets, if there are any here."""
    from lowmem_cft.data.rows import read_training_rows
    from lowmem_cft.inference.embedder import load_embedder

    folder = data_folder()
    if folder is None or not (folder / _TRIPLETS).is_file():
        return None
    rows, _ = read_training_rows(str(folder / _TRIPLETS), limit=num_queries)
    texts = [row.anchor for row in rows]
    texts += [row.positive for row in rows] + [row.negatives[0] for row in rows]
    embed = load_embedder(
        sources.EMBEDDED, torch.device("cpu"), say, float32=True, normalize=True
    ).embed
    x_TD = torch.as_tensor(embed(texts))
    return Batch("model", x_TD[: len(rows)], x_TD[len(rows) :])


def loss_and_gradient(sim_MN: Tensor, temperature: float, mode: str) -> tuple[Tensor, Tensor]:
    """The loss and G (M, N)."""
    with torch.enable_grad():
        sim_MN = sim_MN.detach().requires_grad_()
        target_M = torch.arange(len(sim_MN))
        loss = F.cross_entropy(sim_MN / temperature, target_M)
        if mode == "symmetric":
            # a positive chooses among all queries
            logit_MM = sim_MN[:, : len(sim_MN)].T / temperature
            loss = (loss + F.cross_entropy(logit_MM, target_M)) / 2
        return loss.detach(), torch.autograd.grad(loss, sim_MN)[0]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).double()


def multiplied(grad_MN: Tensor, query_MD: Tensor, doc_ND: Tensor) -> Gradients:
    return grad_MN @ doc_ND, grad_MN.T @ query_MD


def in_16_bit(batch: Batch, temperature: float, mode: str, dtype: torch.dtype) -> Gradients:
    """Embeddings and G rounded to `dtype`; G scaled first where that is float16."""
    query_MD, doc_ND = rounded(batch.query_MD, dtype), rounded(batch.doc_ND, dtype)
    _, grad_MN = loss_and_gradient(query_MD @ doc_ND.T, temperature, mode)
    scale = 1.0
    if dtype == torch.float16:  # by the weight of a query and the temperature, as the kernels do
        scale = _FP16_RANGE * len(query_MD) * temperature
    grad_MN = rounded(grad_MN * scale, dtype) / scale
    return multiplied(grad_MN, query_MD, doc_ND)


def by_halves(
    batch: Batch, temperature: float, mode: str, *, high_alone: bool = False
) -> Gradients:
    """Gradients as `Products.SPLIT_BF16` computes them."""
    half = torch.bfloat16
    query_MD, doc_ND = rounded(batch.query_MD, half), rounded(batch.doc_ND, half)
    low_query_MD = rounded(batch.query_MD - query_MD, half)
    low_doc_ND = rounded(batch.doc_ND - doc_ND, half)
    sim_MN = query_MD @ doc_ND.T + query_MD @ low_doc_ND.T + low_query_MD @ doc_ND.T
    _, grad_MN = loss_and_gradient(sim_MN, temperature, mode)
    grad_MN = rounded(grad_MN, half)
    if high_alone:
        return multiplied(grad_MN, query_MD, doc_ND)
    return multiplied(grad_MN, query_MD + low_query_MD, doc_ND + low_doc_ND)


def in_float32(batch: Batch, temperature: float, mode: str) -> Gradients:
    _, grad_MN = loss_and_gradient(batch.query_MD @ batch.doc_ND.T, temperature, mode)
    return multiplied(grad_MN, batch.query_MD, batch.doc_ND)


WAYS: dict[str, Callable[[Batch, float, str], Gradients]] = {
    "split": by_halves,
    "split_high": partial(by_halves, high_alone=True),
    "bf16": lambda batch, temperature, mode: in_16_bit(batch, temperature, mode, torch.bfloat16),
    "fp16": lambda batch, temperature, mode: in_16_bit(batch, temperature, mode, torch.float16),
    "fp32": in_float32,
}


def errors(got: Gradients, exact: Gradients) -> list[float]:
    """Relative errors of d query and of d doc, each as one vector."""
    pairs = zip(got, exact, strict=True)
    return [float((x.double() - y).norm() / y.norm()) for x, y in pairs]


def measured(batch: Batch, temperature: float, mode: str) -> dict[str, Any]:
    """A row: [error of d query, error of d doc] of each way, and the ratios to the yardstick."""
    query_MD, doc_ND = batch.query_MD.double(), batch.doc_ND.double()
    loss, grad_MN = loss_and_gradient(query_MD @ doc_ND.T, temperature, mode)
    exact = multiplied(grad_MN, query_MD, doc_ND)
    lost = errors(multiplied(rounded(grad_MN, torch.bfloat16), query_MD, doc_ND), exact)
    by_way = {name: errors(way(batch, temperature, mode), exact) for name, way in WAYS.items()}
    return {
        "embeddings": batch.kind,
        "M": len(query_MD),
        "N": len(doc_ND),
        "D": query_MD.shape[1],
        "mode": mode,
        "temperature": temperature,
        "loss": float(f"{float(loss):.4g}"),
        "error": {
            name: [float(f"{error:.3g}") for error in pair]
            for name, pair in {"yardstick": lost, **by_way}.items()
        },
        "by_yardstick": {
            name: round(max(x / y for x, y in zip(by_way[name], lost, strict=True)), 2)
            for name in ("split", "split_high", "bf16", "fp16")
        },
    }


def bf16_from(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """See the module."""
    lowest: dict[str, float | None] = {}
    for key in dict.fromkeys((row["embeddings"], row["D"]) for row in rows):
        own = [row for row in rows if (row["embeddings"], row["D"]) == key]
        too_low = [row["temperature"] for row in own if row["by_yardstick"]["bf16"] > 2]
        enough = {row["temperature"] for row in own if row["temperature"] > max(too_low, default=0)}
        lowest["{} {}".format(*key)] = min(enough, default=None)
    return lowest


def batches(quick: bool) -> Iterator[Batch]:
    size = QUICK_SIZE if quick else SIZE
    for width in WIDTHS[:1] if quick else WIDTHS:
        yield from (drawn(kind, size, width) for kind in KINDS)
    if quick:
        return
    if (batch := of_model(size[0])) is not None:
        yield batch
    else:
        say("no NLI triplets here: the model's embeddings are left out")


def print_row(row: dict[str, Any]) -> None:
    pairs = "  ".join(f"{name} {x:.1e} {y:.1e}" for name, (x, y) in row["error"].items())
    key = " ".join(str(row[name]) for name in ("embeddings", "D", "mode", "temperature"))
    say(f"{key:32} loss {row['loss']:8.4g}  {pairs}  bf16 {row['by_yardstick']['bf16']:.2f} x")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small, and without the model")
    options = parser.parse_args(argv)
    rows = []
    for batch in batches(options.quick):
        for mode in MODES:
            for temperature in TEMPERATURES:
                rows.append(measured(batch, temperature, mode))
                print_row(rows[-1])
    print_line(
        {
            "bf16_from": bf16_from(rows),
            **{
                f"{name}_ratio": max(row["by_yardstick"][name] for row in rows)
                for name in ("split", "split_high")
            },
            "rows": rows,
            "machine": machine(torch.device("cpu")),
            "versions": versions(("lowmem-cft", "torch")),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
