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

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lowmem_cft_kernels.masks import NO_TARGET, Candidates
from lowmem_cft_kernels.options import Direction, FalseNegatives, Hardness, LossOptions
from lowmem_cft_kernels.workspace import STRIP_BYTES, Extent

NORM_EPSILON = 1e-12
"""Norms below it count as it, as in torch.nn.functional.normalize."""


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
        own_key_R, related_key_CJ: an equal pair hides in the columns' softmax alone.
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
    own_key_R: Tensor | None = None
    related_key_CJ: Tensor | None = None
    row_bound_R: Tensor | None = None
    col_bound_C: Tensor | None = None
    guide: Guide | None = None
    hardness: Hardness | None = None
    learns: bool = True

    @property
    def has_positives(self) -> bool:
        """The rows are the queries, and the columns the documents."""
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
        options: what the loss was asked for with.
        blocks: the first is that of queries with documents.
        temperature: a scalar.
        target_MP: columns of positives, fillers repeating one of the row's.
        there_MP: False at fillers.
        weight_MP: of each pair, 0 at fillers; they sum to 1, or to 0 where nothing counts.
        counted_M: queries with a positive and a weight above 0.
        positive_MP: similarity of each pair, before the temperature.
        compute: dtype of everything but the embeddings: float32, or float64 for float64 inputs.
    """

    options: LossOptions
    blocks: tuple[Block, ...]
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
        """Index of the softmax that a direction is in; None if it is in none."""
        softmaxes = enumerate(self.options.softmaxes)
        return next((i for i, softmax in softmaxes if direction in softmax), None)

    @property
    def extent(self) -> Extent:
        """The shapes and the dtype, by which memory goes."""
        doc_ND = self.queries_with_documents.col_CD
        return Extent(
            num_queries=len(self.target_MP),
            num_docs=len(doc_ND),
            width=doc_ND.shape[1],
            num_positives=self.target_MP.shape[1],
            dtype=doc_ND.dtype,
            options=self.options,
        )

    @property
    def best_M(self) -> Tensor:
        """(M,), similarity of each query's best positive."""
        return self.positive_MP.amax(dim=1)


@dataclass(frozen=True)
class _Side:
    """Embeddings with what is known of them: inverse norms, keys (n, K), a guide's embeddings."""

    x_ND: Tensor
    inverse_N: Tensor | None
    keys_NK: Tensor | None
    guide_NG: Tensor | None
    guide_inverse_N: Tensor | None


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a query and a positive; see `Problem`."""

    target_MP: Tensor
    there_MP: Tensor
    weight_MP: Tensor


@dataclass(frozen=True)
class _Bounds:
    """Similarities above which candidates are hidden from queries (M,) and from documents (N,)."""

    bound_M: Tensor | None = None
    bound_N: Tensor | None = None


def make_problem(
    query_MD: Tensor, doc_ND: Tensor, candidates: Candidates, options: LossOptions
) -> Problem:
    """The batch as blocks and vectors; arguments as in `info_nce`, checked before."""
    compute = torch.promote_types(query_MD.dtype, torch.float32)
    pairs = _pairs(candidates, options.weight_M, compute)
    side = partial(_side, compute=compute, normalize=options.normalize)
    guides, bank = options.false_negatives, options.bank
    query_guide = None if guides is None else guides.query_guide_MG
    doc_guide = None if guides is None else guides.doc_guide_NG
    query = side(query_MD, candidates.query_key_MK, query_guide)
    doc = side(doc_ND, candidates.doc_keys, doc_guide)
    banked = None
    if bank is not None and len(bank.doc_CD):
        # whatever guides the bank has, without those of the queries the loss does not ask for them
        bank_guide = None if query_guide is None else bank.guide_CG
        banked = side(bank.doc_CD.detach(), bank.keys_C, bank_guide)
    positive_MP = _pair_products(query, doc, pairs.target_MP, compute)
    bounds = _Bounds() if guides is None else _bounds(guides, query, doc, positive_MP, pairs)
    return Problem(
        options=options,
        blocks=tuple(_blocks(query, doc, banked, candidates, options, pairs, bounds)),
        temperature=torch.as_tensor(options.temperature).to(compute),
        target_MP=pairs.target_MP,
        there_MP=pairs.there_MP,
        weight_MP=pairs.weight_MP,
        counted_M=pairs.weight_MP.sum(dim=1) > 0,
        positive_MP=positive_MP,
        compute=compute,
    )


def _pairs(candidates: Candidates, weight_M: Tensor | None, compute: torch.dtype) -> _Pairs:
    there_MP = candidates.target_MP != NO_TARGET
    some_M1 = candidates.target_MP.amax(dim=1, keepdim=True).clamp(min=0)
    target_MP = torch.where(there_MP, candidates.target_MP, some_M1)
    weight_MP = there_MP.to(compute) / there_MP.sum(dim=1, keepdim=True).clamp(min=1)
    if weight_M is not None:
        weight_MP *= weight_M.to(compute)[:, None]
    weight_MP /= weight_MP.sum().clamp(min=torch.finfo(compute).tiny)
    return _Pairs(target_MP, there_MP, weight_MP)


def _side(
    x_ND: Tensor,
    keys: Tensor | None,
    guide_NG: Tensor | None,
    *,
    compute: torch.dtype,
    normalize: bool,
) -> _Side:
    guide_NG = None if guide_NG is None else guide_NG.detach()
    return _Side(
        x_ND,
        _inverse_norms(x_ND, compute) if normalize else None,
        keys if keys is None or keys.ndim == 2 else keys[:, None],
        guide_NG,
        None if guide_NG is None else _inverse_norms(guide_NG, compute),
    )


def _blocks(
    query: _Side,
    doc: _Side,
    banked: _Side | None,
    candidates: Candidates,
    options: LossOptions,
    pairs: _Pairs,
    bounds: _Bounds,
) -> Iterator[Block]:
    """Every block of the loss, that of queries with documents first."""
    owned, index_M = candidates.owner_N is not None, None
    if owned or Direction.QUERY_TO_QUERY in options.directions:
        index_M = torch.arange(len(query.x_ND), device=query.x_ND.device)
    related_key_NL = None
    if candidates.own_keys is not None and Direction.DOC_TO_QUERY in options.directions:
        related_key_NL = _related_keys(candidates, pairs)
    yield replace(
        _block(Direction.QUERY_TO_DOC, query, doc),
        own_key_R=None if related_key_NL is None else candidates.own_keys,
        related_key_CJ=related_key_NL,
        row_group_R=index_M if owned else None,
        col_group_C=candidates.owner_N,
        own_only=candidates.own_only,
        target_RP=pairs.target_MP,
        has_target_R=pairs.there_MP.any(dim=1),
        row_bound_R=bounds.bound_M,
        col_bound_C=bounds.bound_N,
        hardness=options.hardness,
    )
    if banked is not None:
        yield replace(
            _block(Direction.QUERY_TO_DOC, query, banked),
            row_bound_R=bounds.bound_M,
            hardness=options.hardness,
            learns=False,
        )
    if Direction.QUERY_TO_QUERY in options.directions:
        yield replace(
            _block(Direction.QUERY_TO_QUERY, query, query),
            row_group_R=index_M,
            col_group_C=index_M,
            same_hides=True,
            row_bound_R=bounds.bound_M,
        )
    if Direction.DOC_TO_DOC in options.directions:
        yield _positives_with_documents(doc, candidates, pairs, bounds.bound_M)


def _related_keys(candidates: Candidates, pairs: _Pairs) -> Tensor:
    """(N, L): `positive_keys` of a positive's query; its own key where it is of none, or of several."""
    doc_key_N, key_ML = candidates.doc_keys, candidates.positive_key_ML
    assert doc_key_N is not None
    assert key_ML is not None
    there = pairs.there_MP.flatten()
    index = torch.arange(len(key_ML), device=there.device).repeat_interleave(
        pairs.there_MP.shape[1]
    )
    row_N, count_N = (
        torch.zeros_like(doc_key_N).scatter_add_(0, pairs.target_MP.flatten(), values * there)
        for values in (index, torch.ones_like(index))
    )
    alone_N = count_N == 1
    return torch.where(alone_N[:, None], key_ML[row_N * alone_N], doc_key_N[:, None])


def _block(direction: Direction, rows: _Side, cols: _Side) -> Block:
    """Rows against columns, with all that the two sides say of it."""
    keyed = rows.keys_NK is not None and cols.keys_NK is not None
    guide = None
    if rows.guide_NG is not None and cols.guide_NG is not None:
        assert rows.guide_inverse_N is not None
        assert cols.guide_inverse_N is not None
        guide = Guide(
            row_RG=rows.guide_NG,
            col_CG=cols.guide_NG,
            row_inverse_R=rows.guide_inverse_N,
            col_inverse_C=cols.guide_inverse_N,
        )
    return Block(
        direction=direction,
        row_RD=rows.x_ND,
        col_CD=cols.x_ND,
        row_inverse_R=rows.inverse_N,
        col_inverse_C=cols.inverse_N,
        row_key_RK=rows.keys_NK if keyed else None,
        col_key_CL=cols.keys_NK if keyed else None,
        guide=guide,
    )


def _positives_with_documents(
    doc: _Side, candidates: Candidates, pairs: _Pairs, bound_M: Tensor | None
) -> Block:
    """One row per pair: its positive against all documents that did not come with its query."""
    num_queries, num_positives = pairs.target_MP.shape
    owner_N, key_ML = candidates.owner_N, candidates.positive_key_ML
    pick_R, owned = pairs.target_MP.flatten(), owner_N is not None

    def per_pair(vectors: Tensor) -> Tensor:
        return vectors.repeat_interleave(num_positives, dim=0)

    row_key_RK = None
    if key_ML is not None and doc.keys_NK is not None:
        row_key_RK = torch.cat([doc.keys_NK[pick_R], per_pair(key_ML)], dim=1)
    return replace(
        _block(Direction.DOC_TO_DOC, doc, doc),
        pick_R=pick_R,
        rows_per_query=num_positives,
        row_group_R=per_pair(torch.arange(num_queries, device=pick_R.device)) if owned else None,
        col_group_C=owner_N,
        same_hides=owned,
        target_RP=per_pair(pairs.target_MP),
        has_target_R=per_pair(pairs.there_MP.any(dim=1)),
        target_hides=True,
        row_key_RK=row_key_RK,
        row_bound_R=None if bound_M is None else per_pair(bound_M),
    )


def _bounds(
    false_negatives: FalseNegatives, query: _Side, doc: _Side, positive_MP: Tensor, pairs: _Pairs
) -> _Bounds:
    if query.guide_NG is not None and doc.guide_NG is not None:
        query = replace(query, x_ND=query.guide_NG, inverse_N=query.guide_inverse_N)
        guide = replace(doc, x_ND=doc.guide_NG, inverse_N=doc.guide_inverse_N)
        positive_MP = _pair_products(query, guide, pairs.target_MP, positive_MP.dtype)
    best_M = positive_MP.amax(dim=1)
    scale_M = best_M.abs() if false_negatives.relative else 1.0
    bound_M = best_M - scale_M * false_negatives.margin
    # fillers repeat one of the row's; a row without a target must not raise column 0's
    bound_MP = bound_M[:, None].expand_as(pairs.target_MP)
    bound_MP = bound_MP.masked_fill(~pairs.there_MP, -torch.inf)
    bound_N = bound_M.new_full((len(doc.x_ND),), -torch.inf)
    bound_N.scatter_reduce_(0, pairs.target_MP.flatten(), bound_MP.flatten(), "amax")
    return _Bounds(bound_M, bound_N)


def with_units(problem: Problem) -> Problem:
    """The same with embeddings in the compute dtype, and of unit length where normalised.

    Gradients are then those of the unit vectors. Embeddings that are so already are shared.
    """
    units: dict[int, Tensor] = {}  # by identity: blocks share embeddings

    def unit(x_ND: Tensor, inverse_N: Tensor | None) -> Tensor:
        if id(x_ND) not in units:
            wide_ND = x_ND.to(problem.compute) if inverse_N is None else x_ND * inverse_N[:, None]
            units[id(x_ND)] = wide_ND
        return units[id(x_ND)]

    blocks = (
        replace(
            block,
            row_RD=unit(block.row_RD, block.row_inverse_R),
            col_CD=unit(block.col_CD, block.col_inverse_C),
            row_inverse_R=None,
            col_inverse_C=None,
        )
        for block in problem.blocks
    )
    return replace(problem, blocks=tuple(blocks))


def strips(num_rows: int, row_bytes: int, *, cuda: bool) -> Iterator[slice]:
    """Ranges of rows of a few MiB."""
    yield from row_blocks(num_rows, max(1, STRIP_BYTES[cuda] // row_bytes))


def row_blocks(num_rows: int, size: int) -> Iterator[slice]:
    """Ranges of `size` rows, the last one shorter."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _inverse_norms(x_RD: Tensor, compute: torch.dtype) -> Tensor:
    norm_R: Tensor = torch.linalg.vector_norm(x_RD, dim=1, dtype=compute)
    return norm_R.clamp_(min=NORM_EPSILON).reciprocal_()


def _pair_products(query: _Side, doc: _Side, target_MP: Tensor, compute: torch.dtype) -> Tensor:
    """(M, P): product of each query with its positives, of unit vectors where inverses are given."""
    num_positives, width = target_MP.shape[1], query.x_ND.shape[1]
    product_MP = torch.empty(target_MP.shape, dtype=compute, device=target_MP.device)
    row_bytes = width * compute.itemsize * (1 + num_positives)
    for rows in strips(len(target_MP), row_bytes, cuda=target_MP.is_cuda):
        terms_BPD = query.x_ND[rows, None].to(compute) * doc.x_ND[target_MP[rows]]
        torch.sum(terms_BPD, dim=2, dtype=compute, out=product_MP[rows])
    if query.inverse_N is not None and doc.inverse_N is not None:
        product_MP *= query.inverse_N[:, None] * doc.inverse_N[target_MP]
    return product_MP


def add_at(out: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """out[index] += values, places repeated, in the same order in every run."""
    if out.is_cuda:  # index_add_ adds in any order there, index_put_ sorts first
        return out.index_put_((index,), values, accumulate=True)
    return out.index_add_(0, index, values)


def through_norm(x_RD: Tensor, inverse_R: Tensor, d_x_RD: Tensor) -> None:
    """Turn inverse norm times d loss / d unit vector into d loss / d x, in place.

    d x = h - x <x, h> / |x|^2    with h = (d loss / d unit vector) / |x|
    """
    for rows in strips(len(x_RD), x_RD.shape[1] * d_x_RD.element_size(), cuda=x_RD.is_cuda):
        strip_RD, d_strip_RD = x_RD[rows].to(d_x_RD.dtype), d_x_RD[rows]
        along_R = torch.linalg.vecdot(strip_RD, d_strip_RD) * inverse_R[rows].square()
        # a norm below the bound was not divided by: nothing to take out
        along_R.masked_fill_(inverse_R[rows] >= 1.0 / NORM_EPSILON, 0.0)
        d_strip_RD.addcmul_(strip_RD, along_R[:, None], value=-1.0)
