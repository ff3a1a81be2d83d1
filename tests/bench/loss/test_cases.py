"""The comparison's inputs and the gradients that they should give."""

from __future__ import annotations

import pytest
import torch

from bench.loss import cases
from bench.loss.cases import exact_gradients, make_task
from lowmem_cft_kernels import ONE_WAY, SYMMETRIC, Candidates, LossOptions
from lowmem_cft_kernels.reference import reference_loss
from numerics import relative_error

CPU = torch.device("cpu")
SIZE = (24, 48, 32)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", ["one_way", "symmetric"])
def test_formula(mode: str, normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "_BLOCK", 10 * SIZE[1] * 8)  # blocks of 10, 10 and 4 queries
    task = make_task(SIZE, mode, torch.float32, CPU, 0.1, normalize)
    leaves = [x.double().mul(3).requires_grad_() for x in (task.query_MD, task.doc_ND)]
    value, _ = reference_loss(
        *leaves,
        Candidates(target=torch.arange(SIZE[0])),
        LossOptions(
            temperature=0.1,
            softmaxes=SYMMETRIC if task.symmetric else ONE_WAY,
            normalize=normalize,
        ),
    )
    wanted = torch.autograd.grad(value, leaves)
    scaled = type(task)(*(x.detach() for x in leaves), mode, 0.1, normalize)
    for got, gradient in zip(exact_gradients(scaled), wanted, strict=True):
        assert gradient.abs().max() > 0
        assert relative_error(got, gradient) < 1e-12


@pytest.mark.parametrize("size", [SIZE, (512, 512, 384), (1024, 2048, 768)])
def test_inputs_have_gradients_of_both_kinds(size: tuple[int, int, int]) -> None:
    task = make_task(size, "one_way", torch.float32, CPU, 0.05, True)
    assert relative_error(task.doc_ND.norm(dim=1), torch.ones(size[1])) < 1e-5
    logit_MN = task.query_MD @ task.doc_ND.T / 0.05
    share_M = logit_MN.softmax(dim=1).diagonal()
    assert 0.2 < float(share_M.median()) < 0.8
