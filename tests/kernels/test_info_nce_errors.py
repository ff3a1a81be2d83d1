"""What InfoNCE refuses, and that it says what it got and what it wants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_cft_kernels import (
    GTE,
    ONE_WAY,
    SYMMETRIC,
    Bank,
    Candidates,
    Direction,
    FalseNegatives,
    InfoNCEResult,
    LossPath,
    info_nce,
)

QUERY, DOC, TARGET = torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 1])


def of_candidates(**fields: Any) -> dict[str, Any]:
    return {"candidates": fields}


def of_margin(**fields: Any) -> dict[str, Any]:
    return {"false_negatives": fields}


def of_bank(**fields: Any) -> dict[str, Any]:
    return {"bank": {"doc_CD": torch.ones(5, 4), **fields}}


def long(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


GUIDES = {"query_guide_MG": torch.ones(2, 6), "doc_guide_NG": torch.ones(3, 6)}

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "documents elsewhere": (
        {"doc_ND": DOC.to("meta")},
        "doc_ND: got it on meta, wanted it where query_MD is, on cpu",
    ),
    "candidates elsewhere": (
        of_candidates(target=TARGET.to("meta")),
        "target: got it on meta, wanted it where query_MD is, on cpu",
    ),
    "weights elsewhere": (
        {"weight_M": torch.ones(2, device="meta")},
        "weight_M: got it on meta, wanted it where query_MD is, on cpu",
    ),
    "queries of one dimension": (
        {"query_MD": torch.ones(4)},
        r"got queries \(4,\) and documents \(3, 4\), wanted \(M, D\) and \(N, D\)",
    ),
    "documents of three dimensions": (
        {"doc_ND": torch.ones(1, 3, 4)},
        r"got queries \(2, 4\) and documents \(1, 3, 4\), wanted",
    ),
    "other widths": (
        {"doc_ND": torch.ones(3, 5)},
        r"got queries \(2, 4\) and documents \(3, 5\), wanted .* one D",
    ),
    "two dtypes": (
        {"doc_ND": DOC.double()},
        r"got torch.float32 queries and torch.float64 documents, wanted one floating dtype",
    ),
    "integers": (
        {"query_MD": QUERY.long(), "doc_ND": DOC.long()},
        r"got torch.int64 queries and torch.int64 documents, wanted one floating dtype",
    ),
    "no queries": (
        {"query_MD": QUERY[:0], **of_candidates(target=TARGET[:0])},
        r"got no queries or no documents, wanted at least one",
    ),
    "no documents": ({"doc_ND": DOC[:0]}, r"got no queries or no documents, wanted at least one"),
    **{
        f"temperature {value}": (
            {"temperature": value},
            rf"temperature: got {float(value)}, wanted a finite number above 0",
        )
        for value in (0.0, -0.1, math.nan, math.inf, torch.tensor(-1.0))
    },
    "a temperature per row": (
        {"temperature": torch.ones(2)},
        r"temperature: got a tensor \(2,\), wanted a number or a scalar",
    ),
    "short target": (
        of_candidates(target=TARGET[:1]),
        r"target: got torch.int64 \(1,\), wanted int64 \(2,\) or \(2, 1 or more\)",
    ),
    "target of int32": (
        of_candidates(target=TARGET.int()),
        r"target: got torch.int32 \(2,\), wanted int64 \(2,\)",
    ),
    "target without columns": (
        of_candidates(target=torch.zeros(2, 0).long()),
        r"target: got torch.int64 \(2, 0\), wanted int64 \(2,\) or \(2, 1 or more\)",
    ),
    "target past the end": (
        of_candidates(target=long(0, 3)),
        r"target: got entries in 0\.\.3, wanted 0\.\.2, or -1 for none",
    ),
    "target below none": (
        of_candidates(target=long(-2, 1)),
        r"target: got entries in -2\.\.1, wanted 0\.\.2, or -1 for none",
    ),
    "a positive twice": (
        of_candidates(target=torch.tensor([[0, -1, -1], [2, 1, 2]])),
        r"target: got a column twice in row 1 \(\[2, 1, 2\]\), wanted each positive once",
    ),
    "long owner": (
        of_candidates(owner_N=long(0, 0, 0, 0)),
        r"owner_N: got torch.int64 \(4,\), wanted int64 \(3,\)",
    ),
    "owner of floats": (
        of_candidates(owner_N=torch.zeros(3)),
        r"owner_N: got torch.float32 \(3,\), wanted int64 \(3,\)",
    ),
    "owner past the end": (
        of_candidates(owner_N=long(-1, 0, 2)),
        r"owner_N: got entries in -1\.\.2, wanted 0\.\.1, or -1 for none",
    ),
    "own negatives of nobody": (
        of_candidates(own_only=True),
        r"own_only: got True, which needs owner_N",
    ),
    "keys of other lengths": (
        of_candidates(query_keys=long(0, 0, 0), doc_keys=long(0, 0, 0)),
        r"query_keys: got torch.int64 \(3,\), wanted int64 \(2,\) or \(2, 1 or more\)",
    ),
    "document keys of two dimensions": (
        of_candidates(query_keys=long(0, 0), doc_keys=torch.zeros(3, 1).long()),
        r"doc_keys: got torch.int64 \(3, 1\), wanted int64 \(3,\)",
    ),
    "query keys alone": (
        of_candidates(query_keys=long(0, 0)),
        r"query_keys and doc_keys go together: got one of them",
    ),
    "document keys alone": (
        of_candidates(doc_keys=long(0, 0, 0)),
        r"query_keys and doc_keys go together: got one of them",
    ),
    "positives' keys alone": (
        of_candidates(positive_keys=long(0, 0)),
        r"positive_keys: got them without doc_keys",
    ),
    "own keys alone": (
        of_candidates(own_keys=long(0, 0)),
        r"own_keys: got them without doc_keys, which they go together with",
    ),
    "positives' keys of other lengths": (
        of_candidates(query_keys=long(0, 0), doc_keys=long(0, 0, 0), positive_keys=long(0, 0, 0)),
        r"positive_keys: got torch.int64 \(3,\), wanted int64 \(2,\) or \(2, 1 or more\)",
    ),
    "no softmax": ({"softmaxes": ()}, r"softmaxes: got none, wanted at least one"),
    "a softmax of strings": (
        {"softmaxes": (frozenset({"doc_to_doc"}),)},
        r"softmaxes: got 'doc_to_doc', wanted of \['query_to_doc', 'doc_to_query', ",
    ),
    "a softmax without the positive": (
        {"softmaxes": (*ONE_WAY, frozenset({Direction.DOC_TO_DOC}))},
        r"got one of \['doc_to_doc'\], which does not have the positive in it; add query_to_doc or",
    ),
    "a direction twice": (
        {"softmaxes": SYMMETRIC + GTE},
        r"softmaxes: got \['doc_to_query', 'query_to_doc'\] in two of them, wanted each .* once",
    ),
    "a margin of another length": (
        of_margin(margin=torch.zeros(3)),
        r"margin: got a tensor \(3,\), wanted a number or \(2,\)",
    ),
    "one guide": (
        of_margin(query_guide_MG=torch.ones(2, 6)),
        r"query_guide_MG and doc_guide_NG go together: got one of them",
    ),
    "guides of two widths": (
        of_margin(**{**GUIDES, "doc_guide_NG": torch.ones(3, 5)}),
        r"guide embeddings: got \(3, 5\), wanted \(3, 6\)",
    ),
    "guides of other texts": (
        of_margin(**{**GUIDES, "query_guide_MG": torch.ones(3, 6)}),
        r"guide embeddings: got \(3, 6\), wanted \(2, 6\)",
    ),
    "a guide of one dimension": (
        of_margin(**{**GUIDES, "query_guide_MG": torch.ones(2)}),
        r"guide embeddings: got \(2,\), wanted \(2, G\)",
    ),
    "short weights": (
        {"weight_M": torch.ones(1)},
        r"weight_M: got torch.float32 \(1,\), wanted floats \(2,\)",
    ),
    "weights below 0": (
        {"weight_M": torch.tensor([1.0, -0.5])},
        r"weight_M: got -0.5, wanted 0 or more",
    ),
    "weights of integers": (
        {"weight_M": long(1, 1)},
        r"weight_M: got torch.int64 \(2,\), wanted floats \(2,\)",
    ),
    "a bank of another width": (
        of_bank(doc_CD=torch.ones(5, 3)),
        r"bank: got torch.float32 \(5, 3\), wanted torch.float32 \(C, 4\)",
    ),
    "a bank of another dtype": (
        of_bank(doc_CD=torch.ones(5, 4).double()),
        r"bank: got torch.float64 \(5, 4\), wanted torch.float32 \(C, 4\)",
    ),
    "bank keys of another length": (
        of_bank(keys_C=long(0, 0)),
        r"bank.keys_C: got torch.int64 \(2,\), wanted int64 \(5,\)",
    ),
    "a bank without guide": (
        {**of_bank(), **of_margin(**GUIDES)},
        r"bank.guide_CG: got None, but false_negatives has guides",
    ),
    "a bank with the guide of others": (
        {**of_bank(guide_CG=torch.ones(4, 6)), **of_margin(**GUIDES)},
        r"guide embeddings: got \(4, 6\), wanted \(5, 6\)",
    ),
    "a bank that nobody sees": (
        {**of_bank(), "softmaxes": (frozenset({Direction.DOC_TO_QUERY}),)},
        r"bank: got one, but no softmax has query_to_doc in it",
    ),
    "gradients into another shape": (
        {"out": (torch.ones(2, 4), torch.ones(4, 4))},
        r"out: got torch.float32 \(4, 4\) on cpu, wanted torch.float32 \(3, 4\) on cpu",
    ),
    "gradients into another dtype": (
        {"out": (torch.ones(2, 4).half(), torch.ones(3, 4))},
        r"out: got torch.float16 \(2, 4\) on cpu, wanted torch.float32 \(2, 4\) on cpu",
    ),
}


def call_with(**options: Any) -> InfoNCEResult:
    candidates = Candidates(**{"target": TARGET, **options.pop("candidates", {})})
    if "false_negatives" in options:
        options["false_negatives"] = FalseNegatives(**options["false_negatives"])
    if "bank" in options:
        options["bank"] = Bank(**options["bank"])
    inputs = {"query_MD": QUERY, "doc_ND": DOC, "temperature": 0.1, **options}
    return info_nce(candidates=candidates, **inputs)


@pytest.mark.parametrize("path", [LossPath.REFERENCE, LossPath.CHUNKED])
@pytest.mark.parametrize("wrong", WRONG)
def test_errors_say_got_and_wanted(wrong: str, path: LossPath) -> None:
    options, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        call_with(**options, path=path)


@pytest.mark.parametrize("path", [LossPath.REFERENCE, LossPath.CHUNKED])
def test_what_the_errors_are_tried_on_is_right_otherwise(path: LossPath) -> None:
    options: dict[str, Any] = {
        **of_bank(keys_C=long(0, 1, 2, 3, 4), guide_CG=torch.ones(5, 6)),
        **of_candidates(
            target=torch.tensor([[0, -1], [1, 2]]),
            owner_N=long(0, -1, 1),
            own_only=True,
            query_keys=long(7, 8),
            doc_keys=long(1, 2, 3),
        ),
        **of_margin(**GUIDES, margin=torch.zeros(2)),
    }
    for softmaxes in (ONE_WAY, SYMMETRIC, GTE):
        result = call_with(
            **options,
            softmaxes=softmaxes,
            weight_M=torch.ones(2),
            out=(torch.ones(2, 4), torch.ones(3, 4)),
            path=path,
        )
        assert torch.isfinite(result.loss)
    assert torch.isfinite(call_with(path=path).loss)
