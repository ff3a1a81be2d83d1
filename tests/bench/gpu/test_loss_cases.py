"""The loss's cases: every option, the same numbers in every dtype and layout."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.gpu import loss_cases
from bench.gpu.parts import smoke


def test_the_option_sets_have_every_option() -> None:
    cases = loss_cases
    made = [cases.make_case(words, (12, 20, 8)) for words in cases.OPTION_SETS.values()]
    words = frozenset().union(*cases.OPTION_SETS.values())
    assert words >= cases.SOFTMAXES.keys() | cases.HARDNESS.keys() | cases.MARGINS
    for name, plain in made[0].options.items():
        values = [case.options[name] for case in made[1:]]
        assert any(type(value) is not type(plain) or value != plain for value in values), name
    for name in ("owner_N", "query_keys", "doc_keys"):
        assert any(getattr(case.candidates, name) is not None for case in made), name
    assert {case.candidates.own_only for case in made} == {False, True}
    bounds = [case.options["false_negatives"] for case in made]
    assert {bound.guided for bound in bounds if bound is not None} == {False, True}
    banks = [case.options["bank"] for case in made if case.options["bank"] is not None]
    assert {bank.keys_C is None for bank in banks} == {False, True}


def test_cases_are_the_same_numbers_in_every_dtype() -> None:
    cases = loss_cases
    for words in cases.OPTION_SETS.values():
        case = cases.make_case(words, (37, 53, 40))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rounded = case.to(dtype, torch.device("cpu"))
            assert rounded.query_MD.dtype == dtype
            assert torch.equal(rounded.query_MD.double(), case.query_MD)
            assert torch.equal(rounded.doc_ND.double(), case.doc_ND)


def test_vectors_with_gaps_are_the_same_numbers() -> None:
    cases = loss_cases
    words = cases.OPTION_SETS[smoke.LOSSES[-1]]
    strided = cases.make_case(words, (37, 53, 40)).to(torch.float32, torch.device("cpu"))
    plain = replace(cases.make_case(words, (37, 53, 40)), strided=False)
    plain = plain.to(torch.float32, torch.device("cpu"))
    pairs = [(strided.options["weight_M"], plain.options["weight_M"])]
    bounds = [case.options["false_negatives"].margin for case in (strided, plain)]
    names = ("target", "owner_N", "query_keys", "doc_keys")
    pairs += [
        bounds,
        *((getattr(strided.candidates, n), getattr(plain.candidates, n)) for n in names),
    ]
    for got, wanted in pairs:
        assert torch.equal(got, wanted)
        assert got.stride(-1) > 1
