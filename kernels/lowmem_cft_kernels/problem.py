"""The loss as matrix products: what the chunked and the Triton path work off.

Every direction is a *block*, rows against columns: queries with documents (which serves both
directions of that pair), queries with the bank, queries with queries, positives with documents.
All that decides who is hidden from whom is written as vectors over rows and columns, so that a
tile of any block can be computed from its two ranges of indices alone.

With z = s / temperature, w_r the weight of pair r = (query i, positive t) and L_r the log of its
softmax's denominator, d loss / d z is, for a block whose direction has the pair's query (or its
positive, row by row) in the rows, and for documents that choose among queries,

    sum over the row's pairs of w_r exp(z - L_r)      = exp(z - rho),   rho   = -log sum w_r exp(-L_r)
    sum over the column's pairs of w_r exp(z - L_r)   = exp(z - gamma), gamma likewise

less w_r where a positive stands. Weights, several positives and joint denominators are all inside
rho and gamma.

Shape suffixes: M queries, N documents, P positives per query, R rows and C columns of a block, D
and G embedding sizes, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_cft_kernels.masks import NO_TARGET, Candidates
from lowmem_cft_kernels.options import Bank, Direction, FalseNegatives, Hardness, Softmax

NORM_EPSILON = 1e-12
"""Norms below it count as it, as in torch.nn.functional.normalize."""

_STRIP_BYTES = {False: 4 * 2**20, True: 32 * 2**20}
"""Rows worked on at once where a few numbers per row are wanted, on a CPU and on CUDA."""


@dataclass(frozen=True, kw_only=True)
class Guide:
    """Embeddings of another model, and the inverses of their norms."""

    row_RG: Tensor
    col_CG: Tensor
    row_inverse_R: Tensor
    col_inverse_C: Tensor


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows against columns.

    Attributes:
        direction: of its rows; the bank's is QUERY_TO_DOC too.
        row_RD, col_CD: embeddings. Where `pick_R` is given, row r is row_RD[pick_R[r]] (its guide
            embedding and norm likewise).
        rows_per_query: how many rows belong to one query: 1, or P.
        row_inverse_R, col_inverse_C: inverse norms where inputs are to be normalised, else None.
        row_group_R, col_group_C: who belongs together: with `same_hides` rows do not see columns
            of their own group; otherwise, with `own_only`, columns with a group of 0 or more are
            seen by that group alone.
        target_RP: columns that are positives of the row's query, fillers repeating one of them;
            `has_target_R` is False where there is none. `target_hides`: rows do not see them;
            otherwise rows always do.
        row_key_RK, col_key_CL: any equal pair hides.
        row_bound_R, col_bound_C: similarities above hide, in the rows' and in the columns'
            softmax.
        guide: embeddings whose cosine is compared with the bounds; the block's own if None.
        hardness: of the negatives in the rows' softmax.
        learns: the columns get a gradient.
    """

    direction: Direction
    row_RD: Tensor
    col_CD: Tensor
    pick_R: Tensor | None = None
    rows_per_query: int = 1
    row_inverse_R: Tensor | None = None
    col_inverse_C: Tensor | None = None
    row_group_R: Tensor | None = None
    col_group_C: Tensor | None = None
    same_hides: bool = False
    own_only: bool = False
    target_RP: Tensor | None = None
    has_target_R: Tensor | None = None
    target_hides: bool = False
    row_key_RK: Tensor | None = None
    col_key_CL: Tensor | None = None
    row_bound_R: Tensor | None = None
    col_bound_C: Tensor | None = None
    guide: Guide | None = None
    hardness: Hardness | None = None
    learns: bool = True

    @property
    def has_positives(self) -> bool:
        """Its columns are the documents, and its rows the queries."""
        return self.target_RP is not None and not self.target_hides

    def rows(self, queries: slice) -> slice:
        """The rows that belong to these queries."""
        return slice(queries.start * self.rows_per_query, queries.stop * self.rows_per_query)

    def pick(self, vectors: Tensor, rows: slice) -> Tensor:
        """These rows of a tensor that is indexed like `row_RD`."""
        return vectors[rows] if self.pick_R is None else vectors[self.pick_R[rows]]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A batch and its loss.

    Attributes:
        blocks: the first is that of queries with documents.
        target_MP: columns of positives, fillers repeating one of the row's.
        there_MP: False at fillers.
        weight_MP: of each pair, 0 at fillers; they sum to 1, or to 0 where nothing counts.
        counted_M: queries with a positive and a weight above 0.
        positive_MP: similarity of each pair, before the temperature.
        compute: dtype of everything but the embeddings: float32, or float64 for float64 inputs.
    """

    blocks: tuple[Block, ...]
    softmaxes: tuple[Softmax, ...]
    temperature: Tensor
    target_MP: Tensor
    there_MP: Tensor
    weight_MP: Tensor
    counted_M: Tensor
    positive_MP: Tensor
    compute: torch.dtype

    @property
    def queries_with_documents(self) -> Block:
        """The block that has the positives."""
        return self.blocks[0]

    @property
    def documents_choose(self) -> bool:
        """A softmax goes over the columns of the first block."""
        return self.softmax_of(Direction.DOC_TO_QUERY) is not None

    def softmax_of(self, direction: Direction) -> int | None:
        """Index of the softmax that a direction is in."""
        return next((i for i, one in enumerate(self.softmaxes) if direction in one), None)

    @property
    def best_M(self) -> Tensor:
        """(M,), similarity of each query's best positive."""
        return self.positive_MP.amax(dim=1)


def make_problem(
    query_MD: Tensor,
    doc_ND: Tensor,
    candidates: Candidates,
    *,
    temperature: Tensor,
    softmaxes: Sequence[Softmax],
    false_negatives: FalseNegatives | None,
    hardness: Hardness | None,
    weight_M: Tensor | None,
    bank: Bank | None,
    normalize: bool,
) -> Problem:
    """Arguments as in `info_nce`, checked before."""
    compute = torch.promote_types(query_MD.dtype, torch.float32)
    there_MP = candidates.target_MP != NO_TARGET
    has_target_M = there_MP.any(dim=1)
    some_M1 = candidates.target_MP.amax(dim=1, keepdim=True).clamp(min=0)
    target_MP = torch.where(there_MP, candidates.target_MP, some_M1)
    weight_MP = there_MP.to(compute) / there_MP.sum(dim=1, keepdim=True).clamp(min=1)
    if weight_M is not None:
        weight_MP *= weight_M.to(compute)[:, None]
    weight_MP /= weight_MP.sum().clamp(min=torch.finfo(compute).tiny)

    query_inverse_M = _inverse_norms(query_MD, compute) if normalize else None
    doc_inverse_N = _inverse_norms(doc_ND, compute) if normalize else None
    positive_MP = _pair_products(
        query_MD, doc_ND, target_MP, query_inverse_M, doc_inverse_N, compute
    )
    guides = _guides(false_negatives, bank, compute)
    bound_M = bound_N = None
    if false_negatives is not None:
        best_M = positive_MP.amax(dim=1)
        if guides is not None:
            (query_MG, query_scale_M), (doc_NG, doc_scale_N), _ = guides
            best_M = _pair_products(
                query_MG, doc_NG, target_MP, query_scale_M, doc_scale_N, compute
            ).amax(dim=1)
        scale_M = best_M.abs() if false_negatives.relative else 1.0
        bound_M = best_M - scale_M * false_negatives.margin
        # fillers repeat one of the row's; a row without a target must not raise column 0's
        bound_MP = bound_M[:, None].expand_as(target_MP).masked_fill(~there_MP, -torch.inf)
        bound_N = bound_M.new_full((len(doc_ND),), -torch.inf).scatter_reduce_(
            0, target_MP.flatten(), bound_MP.flatten(), "amax"
        )

    def guide(rows: int, columns: int) -> Guide | None:
        if guides is None:
            return None
        (row_RG, row_inverse_R), (col_CG, col_inverse_C) = guides[rows], guides[columns]
        return Guide(
            row_RG=row_RG, col_CG=col_CG, row_inverse_R=row_inverse_R, col_inverse_C=col_inverse_C
        )

    index_M = torch.arange(len(query_MD), device=query_MD.device)
    query_key_MK = candidates.query_key_MK
    doc_key_N1 = None if candidates.doc_keys is None else candidates.doc_keys[:, None]
    query, doc = 0, 1
    blocks = [
        Block(
            direction=Direction.QUERY_TO_DOC,
            row_RD=query_MD,
            col_CD=doc_ND,
            row_inverse_R=query_inverse_M,
            col_inverse_C=doc_inverse_N,
            row_group_R=None if candidates.owner_N is None else index_M,
            col_group_C=candidates.owner_N,
            own_only=candidates.own_only,
            target_RP=target_MP,
            has_target_R=has_target_M,
            row_key_RK=query_key_MK,
            col_key_CL=doc_key_N1,
            row_bound_R=bound_M,
            col_bound_C=bound_N,
            guide=guide(query, doc),
            hardness=hardness,
        )
    ]
    in_use = frozenset[Direction]().union(*softmaxes)
    if bank is not None and len(bank.doc_CD) and Direction.QUERY_TO_DOC in in_use:
        bank_CD = bank.doc_CD.detach()
        keyed = query_key_MK is not None and bank.keys_C is not None
        blocks.append(
            Block(
                direction=Direction.QUERY_TO_DOC,
                row_RD=query_MD,
                col_CD=bank_CD,
                row_inverse_R=query_inverse_M,
                col_inverse_C=_inverse_norms(bank_CD, compute) if normalize else None,
                row_key_RK=query_key_MK if keyed else None,
                col_key_CL=bank.keys_C[:, None] if keyed and bank.keys_C is not None else None,
                row_bound_R=bound_M,
                guide=guide(query, 2),
                hardness=hardness,
                learns=False,
            )
        )
    if Direction.QUERY_TO_QUERY in in_use:
        blocks.append(
            Block(
                direction=Direction.QUERY_TO_QUERY,
                row_RD=query_MD,
                col_CD=query_MD,
                row_inverse_R=query_inverse_M,
                col_inverse_C=query_inverse_M,
                row_group_R=index_M,
                col_group_C=index_M,
                same_hides=True,
                row_key_RK=query_key_MK,
                col_key_CL=query_key_MK,
                row_bound_R=bound_M,
                guide=guide(query, query),
            )
        )
    if Direction.DOC_TO_DOC in in_use:
        num_positives = target_MP.shape[1]

        def per_pair(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else vector.repeat_interleave(num_positives, dim=0)

        pick_R = target_MP.flatten()
        grouped = candidates.owner_N is not None
        blocks.append(
            Block(
                direction=Direction.DOC_TO_DOC,
                row_RD=doc_ND,
                col_CD=doc_ND,
                pick_R=pick_R,
                rows_per_query=num_positives,
                row_inverse_R=doc_inverse_N,
                col_inverse_C=doc_inverse_N,
                row_group_R=per_pair(index_M) if grouped else None,
                col_group_C=candidates.owner_N,
                same_hides=grouped,
                target_RP=per_pair(target_MP),
                has_target_R=per_pair(has_target_M),
                target_hides=True,
                row_key_RK=None if doc_key_N1 is None else doc_key_N1[pick_R],
                col_key_CL=doc_key_N1,
                row_bound_R=per_pair(bound_M),
                guide=guide(doc, doc),
            )
        )
    return Problem(
        blocks=tuple(blocks),
        softmaxes=tuple(softmaxes),
        temperature=temperature.to(compute),
        target_MP=target_MP,
        there_MP=there_MP,
        weight_MP=weight_MP,
        counted_M=weight_MP.sum(dim=1) > 0,
        positive_MP=positive_MP,
        compute=compute,
    )


def strips(num_rows: int, row_bytes: int, *, cuda: bool) -> Iterator[slice]:
    """Ranges of rows of a few MiB."""
    yield from row_blocks(num_rows, max(1, _STRIP_BYTES[cuda] // row_bytes))


def row_blocks(num_rows: int, size: int) -> Iterator[slice]:
    """Ranges of `size` rows, the last one shorter."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _inverse_norms(x_RD: Tensor, compute: torch.dtype) -> Tensor:
    norm_R: Tensor = torch.linalg.vector_norm(x_RD, dim=1, dtype=compute)
    return norm_R.clamp_(min=NORM_EPSILON).reciprocal_()


def _pair_products(
    query_MD: Tensor,
    doc_ND: Tensor,
    target_MP: Tensor,
    query_inverse_M: Tensor | None,
    doc_inverse_N: Tensor | None,
    compute: torch.dtype,
) -> Tensor:
    """(M, P): product of each query with its positives, of unit vectors where inverses are given."""
    num_positives, width = target_MP.shape[1], query_MD.shape[1]
    product_MP = torch.empty(target_MP.shape, dtype=compute, device=query_MD.device)
    row_bytes = width * compute.itemsize * (1 + num_positives)
    for rows in strips(len(query_MD), row_bytes, cuda=query_MD.is_cuda):
        query_B1D = query_MD[rows, None].to(compute)
        doc_BPD = doc_ND[target_MP[rows]].to(compute)
        product_MP[rows] = torch.linalg.vecdot(query_B1D, doc_BPD)
    if query_inverse_M is not None and doc_inverse_N is not None:
        product_MP *= query_inverse_M[:, None] * doc_inverse_N[target_MP]
    return product_MP


def add_at(out: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """out[index] += values, places repeated, in the same order in every run."""
    if out.is_cuda:  # index_add_ adds in any order there, index_put_ sorts first
        return out.index_put_((index,), values, accumulate=True)
    return out.index_add_(0, index, values)


def through_norm(x_RD: Tensor, inverse_R: Tensor, d_x_RD: Tensor) -> None:
    """From inverse norm times d loss / d unit vector to d loss / d x, in place.

    d x = h - x <x, h> / |x|^2    with h = (d loss / d unit vector) / |x|
    """
    for rows in strips(len(x_RD), x_RD.shape[1] * d_x_RD.element_size(), cuda=x_RD.is_cuda):
        strip_RD, d_strip_RD = x_RD[rows].to(d_x_RD.dtype), d_x_RD[rows]
        along_R = torch.linalg.vecdot(strip_RD, d_strip_RD) * inverse_R[rows].square()
        # a norm below the bound was not divided by: nothing to take out
        along_R.masked_fill_(inverse_R[rows] >= 1.0 / NORM_EPSILON, 0.0)
        d_strip_RD.addcmul_(strip_RD, along_R[:, None], value=-1.0)


_Scaled = tuple[Tensor, Tensor]


def _guides(
    false_negatives: FalseNegatives | None, bank: Bank | None, compute: torch.dtype
) -> tuple[_Scaled, _Scaled, _Scaled] | None:
    """Guide embeddings of queries, documents and bank with the inverses of their norms."""
    if false_negatives is None or not false_negatives.guided:
        return None
    query_MG, doc_NG = false_negatives.query_guide_MG, false_negatives.doc_guide_NG
    assert query_MG is not None
    assert doc_NG is not None
    bank_CG = doc_NG[:0] if bank is None or bank.guide_CG is None else bank.guide_CG
    query, doc, others = (
        (guide.detach(), _inverse_norms(guide.detach(), compute))
        for guide in (query_MG, doc_NG, bank_CG)
    )
    return query, doc, others
