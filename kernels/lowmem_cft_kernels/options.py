"""What an InfoNCE loss may be made of, and how it is computed: values that combine freely.

Shape suffixes: M query rows, N document columns, C bank documents, D and G embedding sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Direction(str, Enum):
    """What is compared with what, for each pair of a query and its positive."""

    QUERY_TO_DOC = "query_to_doc"
    """The query with all documents it sees, and with the bank."""
    DOC_TO_QUERY = "doc_to_query"
    """The positive with all queries that see it."""
    QUERY_TO_QUERY = "query_to_query"
    """The query with all other queries."""
    DOC_TO_DOC = "doc_to_doc"
    """The positive with all documents that neither came with its query nor are positives of it."""


Softmax = frozenset[Direction]
"""The comparisons that share one denominator."""


def _softmax(*names: str) -> Softmax:
    return frozenset(Direction(name) for name in names)


ONE_WAY: tuple[Softmax, ...] = (_softmax("query_to_doc"),)
"""Each query picks its positive (SimCSE, arXiv 2104.08821, eq. 5)."""
SYMMETRIC: tuple[Softmax, ...] = (_softmax("query_to_doc"), _softmax("doc_to_query"))
"""The mean of that and of each positive picking its query (CLIP, arXiv 2103.00020, fig. 3)."""
GTE: tuple[Softmax, ...] = (
    _softmax("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"),
)
"""All comparisons in one denominator; the positive is in it twice (arXiv 2308.03281, sec. 3.2)."""
QWEN3: tuple[Softmax, ...] = (_softmax("query_to_doc", "query_to_query", "doc_to_doc"),)
"""As GTE without documents picking queries (arXiv 2506.05176, eq. 1, without its margin)."""
SOFTMAXES = {"one_way": ONE_WAY, "symmetric": SYMMETRIC, "gte": GTE, "qwen3": QWEN3}
"""These by name."""


def check_softmaxes(softmaxes: Sequence[Softmax]) -> None:
    """Raise ValueError unless each has the positive in it and none shares a direction."""
    if not softmaxes:
        raise ValueError("softmaxes: got none, wanted at least one")
    seen: set[Direction] = set()
    for softmax in softmaxes:
        for name in softmax:
            if not isinstance(name, Direction):
                raise ValueError(
                    f"softmaxes: got {name!r}, wanted of {[member.value for member in Direction]}"
                )
        if not softmax & {Direction.QUERY_TO_DOC, Direction.DOC_TO_QUERY}:
            raise ValueError(
                f"softmaxes: got one of {sorted(member.value for member in softmax)}, which does "
                "not have the positive in it; add query_to_doc or doc_to_query"
            )
        if seen & softmax:
            raise ValueError(
                f"softmaxes: got {sorted(member.value for member in seen & softmax)} in two of "
                "them, wanted each direction once"
            )
        seen |= softmax


@dataclass(frozen=True, kw_only=True)
class FalseNegatives:
    """Hides candidates that are about as similar as the positive: probably positives themselves.

    Hidden is what has a similarity above  p - margin,  or  p - margin |p|  if relative, where p is
    that of the query's most similar positive (arXiv 2407.15831, sec. 3.2). Where a document
    chooses among queries, the bound is the highest of those of the queries it is a positive of. No
    gradient goes through the choice.

    Args:
        margin: in units of similarity, before the temperature; negative keeps what is a little
            more similar than the positive. A tensor (M,) gives each query its own.
        relative: the margin is a share of the positive's similarity.
        query_guide_MG, doc_guide_NG: embeddings of the same texts by another model; their cosine
            then decides in place of the embeddings being trained (GISTEmbed, arXiv 2402.16829).
    """

    margin: float | Tensor = 0.0
    relative: bool = False
    query_guide_MG: Tensor | None = None
    doc_guide_NG: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.query_guide_MG is None) != (self.doc_guide_NG is None):
            raise ValueError(
                "query_guide_MG and doc_guide_NG go together: got one of them without the other"
            )

    @property
    def guided(self) -> bool:
        """Another model's embeddings decide."""
        return self.query_guide_MG is not None


class Negatives(str, Enum):
    """Which negatives of a query are weighted."""

    HARD = "hard"
    """Those given to it (`Candidates.owner_N`)."""
    IN_BATCH = "in-batch"
    """All others, and the bank."""
    ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Hardness:
    """Raises the weight of similar negatives in the query's denominator.

    Adds strength * s to the logit s / temperature of a negative, s being its similarity and the
    addition a constant for the gradient (LLaVE, arXiv 2503.04812, eq. 5).
    """

    strength: float
    on: Negatives = Negatives.ALL


class Products(str, Enum):
    """How float32 embeddings are multiplied."""

    EXACT = "exact"
    """As float32, which tensor cores don't do."""
    SPLIT_BF16 = "split-bf16"
    """On tensor cores, as products of bfloat16 halves: logits to about float32's precision; of a
    gradient, only d loss / d similarity is rounded to bfloat16. See `split`."""


@dataclass(frozen=True, kw_only=True)
class Bank:
    """More documents that every query sees as negatives, and that get no gradient.

    Args:
        doc_CD: (C, D), same dtype and device as the other documents.
        keys_C: int64 (C,), compared with `Candidates.query_keys`.
        guide_CG: (C, G), needed where `FalseNegatives` has guides.
    """

    doc_CD: Tensor
    keys_C: Tensor | None = None
    guide_CG: Tensor | None = None


class LossPath(str, Enum):
    """How the loss is computed. Every path gives the same numbers up to rounding."""

    REFERENCE = "reference"
    """The formula through autograd; holds M x N matrices."""
    CHUNKED = "chunked"
    """Plain torch on any device, in a bounded workspace."""
    TRITON = "triton"
    """Fused CUDA kernels beside two matrix products a tile, in a bounded workspace."""


WORKSPACE_BYTES = 60 * 2**20
"""The workspace that is taken where none is asked for."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The keywords of `info_nce`: the loss, and in the last three how it is computed.

    Args:
        temperature: > 0, a number or a scalar tensor; similarities are divided by it. The value
            of one on a GPU is not looked at.
        softmaxes: which comparisons share a denominator; the loss is the mean over softmaxes.
            `ONE_WAY`, `SYMMETRIC`, `GTE`, `QWEN3`, or others (see `Direction`).
        false_negatives: hides candidates about as similar as the positive.
        hardness: raises the weight of similar negatives.
        weight_M: floats (M,) >= 0; the loss is the weighted mean over queries. A query without a
            positive, or with weight 0, adds nothing. Where none is left, loss and gradients are 0.
            On a GPU, values are not looked at.
        bank: documents without a gradient.
        normalize: take cosines: the gradient is then that of the raw inputs.
        products: how the Triton path multiplies float32 inputs. `SPLIT_BF16` (float32 alone, on CUDA
            from compute capability 8.0 on) does it on tensor cores, and holds what
            `split_bytes` gives beside the workspace: O((M + N) D). Other paths always
            compute exactly.
        path: how to compute it; chosen by device, dtype and size if None (see `choose_path`).
        workspace_bytes: bound on what is held besides inputs, gradients and a few numbers per
            query and document, 60 MiB if None; does not change the result beyond rounding.
            Embeddings whose rows have gaps between their elements are copied besides.
    """

    temperature: float | Tensor
    softmaxes: Sequence[Softmax] = ONE_WAY
    false_negatives: FalseNegatives | None = None
    hardness: Hardness | None = None
    weight_M: Tensor | None = None
    bank: Bank | None = None
    normalize: bool = False
    products: Products = Products.EXACT
    path: LossPath | None = None
    workspace_bytes: int | None = None

    @property
    def directions(self) -> frozenset[Direction]:
        """The directions of all softmaxes."""
        return frozenset[Direction]().union(*self.softmaxes)

    @property
    def most_bytes(self) -> int:
        """Bytes that the workspace may have."""
        return self.workspace_bytes or WORKSPACE_BYTES

    def validate(self, query_MD: Tensor, doc_ND: Tensor) -> None:
        """Raise ValueError where an option is wrong, or does not fit the embeddings or another one.

        Weights and temperatures on a GPU are not looked at: the host would wait for all that is
        queued there.
        """
        _check_temperature(self.temperature)
        check_softmaxes(self.softmaxes)
        if self.bank is not None and Direction.QUERY_TO_DOC not in self.directions:
            raise ValueError("bank: got one, but no softmax has query_to_doc in it")
        if not isinstance(self.products, Products):
            raise ValueError(
                f"products: got {self.products!r}, wanted of {[member.value for member in Products]}"
            )
        if self.weight_M is not None:
            _check_weights(self.weight_M, len(query_MD))
        if self.bank is not None:
            _check_bank(self.bank, doc_ND)
        if self.false_negatives is not None:
            _check_margin(self.false_negatives, len(query_MD))
            _check_guides(self.false_negatives, len(query_MD), len(doc_ND), self.bank)


def _check_temperature(temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(
                f"temperature: got a tensor {tuple(temperature.shape)}, wanted a number or a scalar"
            )
        if temperature.device.type != "cpu":
            return
        temperature = float(temperature.detach())
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: got {temperature}, wanted a finite number above 0")


def _check_weights(weight_M: Tensor, num_queries: int) -> None:
    if weight_M.shape != (num_queries,) or not weight_M.is_floating_point():
        raise ValueError(
            f"weight_M: got {weight_M.dtype} {tuple(weight_M.shape)}, wanted floats "
            f"({num_queries},)"
        )
    if weight_M.device.type == "cpu" and bool((weight_M < 0).any()):
        raise ValueError(f"weight_M: got {float(weight_M.min())}, wanted 0 or more")


def _check_bank(bank: Bank, doc_ND: Tensor) -> None:
    doc_CD, keys_C, width = bank.doc_CD, bank.keys_C, doc_ND.shape[1]
    if doc_CD.dtype != doc_ND.dtype or doc_CD.ndim != 2 or doc_CD.shape[1] != width:
        raise ValueError(
            f"bank: got {doc_CD.dtype} {tuple(doc_CD.shape)}, wanted {doc_ND.dtype} (C, {width})"
        )
    if keys_C is not None and (keys_C.dtype != torch.int64 or keys_C.shape != doc_CD.shape[:1]):
        raise ValueError(
            f"bank.keys_C: got {keys_C.dtype} {tuple(keys_C.shape)}, wanted int64 ({len(doc_CD)},)"
        )


def _check_margin(false_negatives: FalseNegatives, num_queries: int) -> None:
    margin = false_negatives.margin
    if isinstance(margin, Tensor) and margin.shape != (num_queries,):
        raise ValueError(
            f"margin: got a tensor {tuple(margin.shape)}, wanted a number or ({num_queries},)"
        )


def _check_guides(
    false_negatives: FalseNegatives, num_queries: int, num_docs: int, bank: Bank | None
) -> None:
    query_MG, doc_NG = false_negatives.query_guide_MG, false_negatives.doc_guide_NG
    if query_MG is None or doc_NG is None:
        return
    guides = [(query_MG, num_queries), (doc_NG, num_docs)]
    if bank is not None:
        if bank.guide_CG is None:
            raise ValueError("bank.guide_CG: got None, but false_negatives has guides")
        guides.append((bank.guide_CG, len(bank.doc_CD)))
    width = query_MG.shape[1] if query_MG.ndim == 2 else "G"
    for guide, length in guides:
        if guide.ndim != 2 or guide.shape != (length, width):
            raise ValueError(
                f"guide embeddings: got {tuple(guide.shape)}, wanted ({length}, {width})"
            )
