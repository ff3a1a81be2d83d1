"""InfoNCE value and gradient in bounded memory, on any device, in plain torch.

Blocks of query rows are scored against all candidates; their logits live only while they are
worked on. Logits are float32 (float64 for float64 inputs): rounding them to 16 bit costs percents
of the gradient at low temperatures. Where documents choose among queries, or a denominator is
shared with something that is not row by row, a first pass collects the log-sum-exps and a second
one computes the logits again, unless all of them fit the workspace; otherwise one pass does. See
`problem` for the formulas.

The temperature needs no pass of its own: with G = d loss / d z, d loss / d temperature =
-sum_ij G_ij z_ij / temperature, and the sum over j is a product of row i with its own gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_cft_kernels.denominators import column_share, join, mean_loss, row_share
from lowmem_cft_kernels.options import Direction, Negatives
from lowmem_cft_kernels.problem import (
    Block,
    Problem,
    add_at,
    row_blocks,
    through_norm,
    with_units,
)
from lowmem_cft_kernels.tally import Tally
from lowmem_cft_kernels.workspace import (
    HELD_SHARE,
    TILE_BYTES,
    UNITS_SHARE,
    bytes_per_query,
    held_bytes,
    unit_bytes,
)


def _tiles(col_CD: Tensor, compute: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The columns in the compute dtype: as they are, or tile by tile if that takes a copy."""
    num_columns = len(col_CD)
    size = num_columns
    if col_CD.dtype != compute:
        size = max(1, TILE_BYTES // (col_CD.shape[1] * compute.itemsize))
    for columns in row_blocks(num_columns, size):
        yield columns, col_CD[columns].to(compute)


def _products(row_RD: Tensor, col_CD: Tensor, scale_C: Tensor | None) -> Tensor:
    """(R, C) in the dtype of the rows, scaled by columns."""
    out_RC = row_RD.new_empty((len(row_RD), len(col_CD)))
    for columns, tile_CD in _tiles(col_CD, row_RD.dtype):
        torch.matmul(row_RD, tile_CD.T, out=out_RC[:, columns])
    return out_RC if scale_C is None else out_RC.mul_(scale_C)


def _hidden(block: Block, rows: slice) -> Tensor | None:
    """bool (R, C): whom the vectors hide, bounds and positives apart; None if nobody."""
    hidden_RC = None
    if block.row_group_R is not None and (block.same_hides or block.own_only):
        assert block.col_group_C is not None
        hidden_RC = block.col_group_C == block.row_group_R[rows, None]
        if not block.same_hides:
            hidden_RC.logical_not_().logical_and_(block.col_group_C >= 0)
    if block.row_key_RK is not None and block.col_key_CL is not None:
        for row_key_R in block.row_key_RK[rows].unbind(dim=1):
            for col_key_C in block.col_key_CL.unbind(dim=1):
                same_RC = row_key_R[:, None] == col_key_C
                hidden_RC = same_RC if hidden_RC is None else hidden_RC.logical_or_(same_RC)
    return hidden_RC


def _hidden_in_columns(block: Block, rows: slice, hidden_RC: Tensor | None) -> Tensor | None:
    """Whom the vectors hide in the columns' softmax, given whom they do in the rows'."""
    if block.own_key_R is None or block.related_key_CJ is None:
        return hidden_RC
    assert hidden_RC is not None, "own keys come with keys"
    own_key_R1 = block.own_key_R[rows, None]
    for related_key_C in block.related_key_CJ.unbind(dim=1):
        hidden_RC = hidden_RC | (own_key_R1 == related_key_C)
    return hidden_RC


def _with_positives(block: Block, rows: slice, hidden_RC: Tensor) -> Tensor:
    """Settles in place what the block says of the columns that are positives of a row's query."""
    if block.target_RP is not None and block.has_target_R is not None:
        target_RP = block.target_RP[rows]
        was_RP, has_R1 = hidden_RC.gather(1, target_RP), block.has_target_R[rows, None]
        hidden_RC.scatter_(
            1, target_RP, was_RP | has_R1 if block.target_hides else was_RP & ~has_R1
        )
    return hidden_RC


@dataclass
class _Scores:
    """Logits of some rows of a block, and who is hidden in the softmax of rows and of columns."""

    logit_RC: Tensor
    hidden_row_RC: Tensor | None
    hidden_col_RC: Tensor | None


def _row_scale(problem: Problem, block: Block, rows: slice) -> Tensor:
    """(R, 1), or a scalar: inverse norms by the temperature."""
    if block.row_inverse_R is None:
        return problem.temperature.reciprocal()
    return (block.pick(block.row_inverse_R, rows) / problem.temperature)[:, None]


def _scaled_rows(problem: Problem, block: Block, rows: slice) -> Tensor:
    """(R, D): of unit length if normalised, by the temperature: R D products instead of R C."""
    row_RD = block.pick(block.row_RD, rows).to(problem.compute)
    return row_RD * _row_scale(problem, block, rows)


def _logits(problem: Problem, block: Block, rows: slice) -> Tensor:
    """(R, C): s / temperature, without hardness and unmasked."""
    temperature = problem.temperature
    logit_RC = _products(_scaled_rows(problem, block, rows), block.col_CD, block.col_inverse_C)
    if block.has_positives:  # the same number as in the loss, whatever order it was added in
        assert block.target_RP is not None
        logit_RC.scatter_(1, block.target_RP[rows], problem.positive_MP[rows] / temperature)
    return logit_RC


def _scores(
    problem: Problem,
    block: Block,
    rows: slice,
    *,
    columns_too: bool,
    logit_RC: Tensor | None = None,
) -> _Scores:
    """Logits, computed where they are not given, and masks; nothing is masked yet."""
    compute, temperature = problem.compute, problem.temperature
    logit_RC = _logits(problem, block, rows) if logit_RC is None else logit_RC
    hidden_RC = _hidden(block, rows)
    if block.row_bound_R is None:
        if hidden_RC is None and block.target_hides:
            hidden_RC = torch.zeros_like(logit_RC, dtype=torch.bool)
        hidden_col_RC = _hidden_in_columns(block, rows, hidden_RC) if columns_too else hidden_RC
        if hidden_RC is not None:
            hidden_RC = _with_positives(block, rows, hidden_RC)
        if hidden_col_RC is not None and hidden_col_RC is not hidden_RC:
            hidden_col_RC = _with_positives(block, rows, hidden_col_RC)
        return _Scores(logit_RC, hidden_RC, hidden_col_RC)
    guide_RC, unit_of = logit_RC, temperature
    if (guide := block.guide) is not None:
        guide_RG = block.pick(guide.row_RG, rows).to(compute)
        guide_RG = guide_RG * block.pick(guide.row_inverse_R, rows)[:, None]
        guide_RC = _products(guide_RG, guide.col_CG, guide.col_inverse_C)
        unit_of = torch.ones_like(temperature)
    hidden: list[Tensor] = []
    for bound in (block.row_bound_R[rows, None], block.col_bound_C if columns_too else None):
        if bound is not None:
            above_RC = guide_RC > bound / unit_of
            if hidden:
                hidden_RC = _hidden_in_columns(block, rows, hidden_RC)
            if hidden_RC is not None:
                above_RC.logical_or_(hidden_RC)
            hidden.append(_with_positives(block, rows, above_RC))
    return _Scores(logit_RC, hidden[0], hidden[-1])


def _count(problem: Problem, rows: slice, scores: _Scores, tally: Tally) -> None:
    """Add the rows of a block of queries with documents to the tally; the logits stay."""
    logit_RC, hidden_RC = scores.logit_RC, scores.hidden_row_RC
    best_R1 = problem.best_M[rows, None] / problem.temperature
    # ones and zeros as floats: torch sums truth values by way of an int64 copy, 8 times the bytes
    scratch_RC = torch.gt(logit_RC, best_R1, out=torch.empty_like(logit_RC))
    if hidden_RC is None:
        tally.above_M[rows] += scratch_RC.sum(dim=1).long()
        tally.seen_M[rows] += logit_RC.shape[1]
        tally.sum_M[rows] += logit_RC.sum(dim=1) * problem.temperature
        return
    tally.above_M[rows] += scratch_RC.masked_fill_(hidden_RC, 0.0).sum(dim=1).long()
    torch.logical_not(hidden_RC, out=scratch_RC)
    tally.seen_M[rows] += scratch_RC.sum(dim=1).long()
    tally.sum_M[rows] += scratch_RC.mul_(logit_RC).sum(dim=1) * problem.temperature


def _harden(problem: Problem, block: Block, rows: slice, logit_RC: Tensor) -> None:
    """Add the hardness of the rows' softmax to the logits, in place."""
    hardness = block.hardness
    if hardness is None:
        return
    factor: Tensor = 1.0 + hardness.strength * problem.temperature
    if hardness.on is not Negatives.ALL:
        own_RC = torch.zeros((), dtype=torch.bool, device=logit_RC.device)
        if block.row_group_R is not None and block.col_group_C is not None:
            own_RC = block.col_group_C == block.row_group_R[rows, None]
        weighted_RC = own_RC if hardness.on is Negatives.HARD else ~own_RC
        factor = torch.where(weighted_RC, factor, 1.0)
    positive_RP = None
    if block.target_RP is not None:
        positive_RP = logit_RC.gather(1, block.target_RP[rows])
    logit_RC.mul_(factor)
    if block.target_RP is not None and positive_RP is not None:
        logit_RC.scatter_(1, block.target_RP[rows], positive_RP)


def _exp_shifted(logit_RC: Tensor, hidden_RC: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """Max and log-sum-exp along `dim`, which stays; logits become exp(logit - max), 0 if hidden."""
    if hidden_RC is not None:
        logit_RC.masked_fill_(hidden_RC, -torch.inf)
    top = logit_RC.amax(dim=dim, keepdim=True).nan_to_num_(neginf=0.0)
    total = logit_RC.sub_(top).exp_().sum(dim=dim, keepdim=True)
    return top, total.log_().add_(top)


class Chunked:
    """The loss of one problem, its gradients written to `d_query_MD` and `d_doc_ND`."""

    def __init__(self, problem: Problem, d_query_MD: Tensor, d_doc_ND: Tensor) -> None:
        self.given = problem
        self.d_query_MD, self.d_doc_ND = d_query_MD, d_doc_ND
        extent, self.held_MN = problem.extent, None
        most = left = problem.options.most_bytes
        if 0 < (held := held_bytes(extent)) <= most * HELD_SHARE:
            shape = (extent.num_queries, extent.num_docs)
            self.held_MN = torch.empty(shape, dtype=problem.compute, device=d_query_MD.device)
            left -= held
        if 0 < (units := unit_bytes(extent)) <= most * UNITS_SHARE:
            problem = with_units(problem)
            left -= units
        elif extent.dtype != problem.compute:
            left -= min(TILE_BYTES, left // 2)
        self.problem = problem
        self.size = max(1, int(left / bytes_per_query(extent)))  # queries worked on at once
        self.tally = Tally.empty(problem)
        self.product = torch.zeros((), dtype=problem.compute, device=d_query_MD.device)

    def run(self) -> tuple[Tensor, Tensor]:
        """Loss and d loss / d temperature."""
        problem, given = self.problem, self.given.queries_with_documents
        self.d_query_MD.zero_()
        self.d_doc_ND.zero_()
        loss = self._two_passes() if problem.documents_choose else self._one_pass()
        if given.row_inverse_R is not None and given.col_inverse_C is not None:
            if problem is not self.given:
                self.d_query_MD *= given.row_inverse_R[:, None]
                self.d_doc_ND *= given.col_inverse_C[:, None]
            through_norm(given.row_RD, given.row_inverse_R, self.d_query_MD)
            through_norm(given.col_CD, given.col_inverse_C, self.d_doc_ND)
        return loss, -self.product / problem.temperature

    # -- log-sum-exps ---------------------------------------------------------------------------

    def _one_pass(self) -> Tensor:
        """Everything of a block of queries at once; its logits are the only ones held."""
        problem, loss = self.problem, self.d_query_MD.new_zeros((), dtype=self.problem.compute)
        for queries in self._query_blocks():
            parts, lse_BP = [], None
            for block in problem.blocks:
                rows = block.rows(queries)
                logit_RC, hidden_RC = self._row_logits(block, rows, observe=True)
                top_R1, lse_R1 = _exp_shifted(logit_RC, hidden_RC, 1)
                parts.append((block, rows, logit_RC, top_R1))
                lse_BP = join(problem, lse_BP, lse_R1)
                del logit_RC, hidden_RC  # or the next block of queries would be held beside them
            assert lse_BP is not None
            loss += mean_loss(problem, queries, [lse_BP])
            while parts:
                block, rows, grad_RC, top_R1 = parts.pop(0)
                shift_R1, factor_R1 = row_share(problem, block, queries, lse_BP)
                grad_RC.mul_(factor_R1 * torch.exp(top_R1 - shift_R1))
                self._push(block, rows, grad_RC)
                del grad_RC
        return loss

    def _two_passes(self) -> Tensor:
        problem = self.problem
        top_N, total_N, lse_MP = self._first_pass()
        column_N = total_N.log_().add_(top_N)
        choosing = problem.softmax_of(Direction.DOC_TO_QUERY)
        assert choosing is not None
        column_MP = column_N[problem.target_MP]
        rows_lse_MP = lse_MP[choosing]
        lse_MP[choosing] = (
            column_MP if rows_lse_MP is None else torch.logaddexp(rows_lse_MP, column_MP)
        )
        known = [softmax_MP for softmax_MP in lse_MP if softmax_MP is not None]
        assert len(known) == len(lse_MP)
        everyone = slice(0, len(problem.target_MP))
        loss = mean_loss(problem, everyone, known)
        columns = column_share(problem, known[choosing])
        for queries in self._query_blocks():
            for block in problem.blocks:
                softmax = problem.softmax_of(block.direction)
                share = None
                if softmax is not None:
                    share = row_share(problem, block, queries, known[softmax][queries])
                grad_RC = self._gradient(block, block.rows(queries), share, columns)
                self._push(block, block.rows(queries), grad_RC)
                del grad_RC
        return loss

    def _first_pass(self) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Maximum and shifted sum of each document's column; log-sum-exp of rows by softmax."""
        problem, documents = self.problem, self.problem.queries_with_documents
        top_N = self.d_doc_ND.new_full((len(documents.col_CD),), -torch.inf, dtype=problem.compute)
        total_N = torch.zeros_like(top_N)
        lse_MP: list[Tensor | None] = [None] * len(problem.options.softmaxes)
        for queries in self._query_blocks():
            for block in problem.blocks:
                rows = block.rows(queries)
                scores = _scores(problem, block, rows, columns_too=block is documents)
                if block.direction is Direction.QUERY_TO_DOC:
                    _count(problem, rows, scores, self.tally)
                if block is documents:
                    _merge_columns(scores, top_N, total_N)
                    if self.held_MN is not None:
                        self.held_MN[rows] = scores.logit_RC
                softmax = problem.softmax_of(block.direction)
                if softmax is None:
                    continue
                _harden(problem, block, rows, scores.logit_RC)
                lse_R1 = _exp_shifted(scores.logit_RC, scores.hidden_row_RC, 1)[1]
                del scores  # as in _one_pass
                held_MP = lse_MP[softmax]
                if held_MP is None:
                    held_MP = lse_R1.new_full(problem.target_MP.shape, -torch.inf)
                    lse_MP[softmax] = held_MP
                held_MP[queries] = join(problem, held_MP[queries], lse_R1)
        return top_N, total_N, lse_MP

    def _query_blocks(self) -> Iterator[slice]:
        yield from row_blocks(len(self.problem.target_MP), self.size)

    def _row_logits(
        self, block: Block, rows: slice, *, observe: bool
    ) -> tuple[Tensor, Tensor | None]:
        scores = _scores(self.problem, block, rows, columns_too=False)
        if observe and block.direction is Direction.QUERY_TO_DOC:
            _count(self.problem, rows, scores, self.tally)
        _harden(self.problem, block, rows, scores.logit_RC)
        return scores.logit_RC, scores.hidden_row_RC

    # -- gradients ------------------------------------------------------------------------------

    def _gradient(
        self,
        block: Block,
        rows: slice,
        row_share: tuple[Tensor, Tensor] | None,
        column_share: tuple[Tensor, Tensor],
    ) -> Tensor:
        """(R, C), d loss / d z without the positives' own share."""
        problem, column_RC = self.problem, None
        columns_too = block is problem.queries_with_documents
        held_RC = self.held_MN[rows] if columns_too and self.held_MN is not None else None
        scores = _scores(problem, block, rows, columns_too=columns_too, logit_RC=held_RC)
        if columns_too:
            shift_N, factor_N = column_share
            column_RC = (scores.logit_RC - shift_N).exp_()
            if scores.hidden_col_RC is not None:
                column_RC.masked_fill_(scores.hidden_col_RC, 0.0)
            column_RC.mul_(factor_N)
        if row_share is None:
            assert column_RC is not None
            return column_RC
        _harden(problem, block, rows, scores.logit_RC)
        shift_R1, factor_R1 = row_share
        grad_RC = scores.logit_RC.sub_(shift_R1).exp_()
        if scores.hidden_row_RC is not None:
            grad_RC.masked_fill_(scores.hidden_row_RC, 0.0)
        grad_RC.mul_(factor_R1)
        return grad_RC if column_RC is None else grad_RC.add_(column_RC)

    def _push(self, block: Block, rows: slice, grad_RC: Tensor) -> None:
        """Through the block's product: from d loss / d z (less the positives') to embeddings."""
        problem, compute = self.problem, self.problem.compute
        if block.has_positives:
            assert block.target_RP is not None
            grad_RC.scatter_add_(1, block.target_RP[rows], -problem.weight_MP[rows])
        if block.col_inverse_C is not None:
            grad_RC.mul_(block.col_inverse_C)
        row_RD = _scaled_rows(problem, block, rows)
        d_row_RD = None
        for columns, tile_CD in _tiles(block.col_CD, compute):
            part_RD = grad_RC[:, columns] @ tile_CD
            d_row_RD = part_RD if d_row_RD is None else d_row_RD.add_(part_RD)
        assert d_row_RD is not None
        if block.learns:
            self._d_columns(block).addmm_(grad_RC.T, row_RD)
        self.product += torch.tensordot(row_RD, d_row_RD)
        d_row_RD.mul_(_row_scale(problem, block, rows))
        if block.pick_R is None:
            self.d_query_MD[rows] += d_row_RD
        else:
            add_at(self.d_doc_ND, block.pick_R[rows], d_row_RD)

    def _d_columns(self, block: Block) -> Tensor:
        query_columns = block.direction is Direction.QUERY_TO_QUERY
        return self.d_query_MD if query_columns else self.d_doc_ND


def _merge_columns(scores: _Scores, top_N: Tensor, total_N: Tensor) -> None:
    """Add some rows to the columns' running maximum and shifted sum."""
    logit_RN = scores.logit_RC.clone()
    if scores.hidden_col_RC is not None:
        logit_RN.masked_fill_(scores.hidden_col_RC, -torch.inf)
    new_N = torch.maximum(top_N, logit_RN.amax(dim=0))
    shift_N = new_N.nan_to_num(neginf=0.0)
    total_N.mul_(torch.exp(top_N - shift_N)).add_(logit_RN.sub_(shift_N).exp_().sum(dim=0))
    top_N.copy_(new_N)
