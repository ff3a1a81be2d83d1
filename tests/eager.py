"""The loss as a model that runs in 16 bit would compute it: what 16-bit paths are measured by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from loss_cases import Case
from lowmem_cft_kernels import InfoNCEResult, Path
from lowmem_cft_kernels.reference import reference_loss


class _EagerProducts(TorchFunctionMode):
    """Similarities by products of 16-bit matrices."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.count = dtype, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.__matmul__, Tensor.matmul) and args[0].requires_grad:
            self.count += 1
            return (args[0].to(self.dtype) @ args[1].to(self.dtype)).float()
        return func(*args, **(kwargs or {}))


def eagerly(case: Case) -> InfoNCEResult:
    """The formula with 16-bit products, a float32 cross entropy and 16-bit gradients."""
    query_MD, doc_ND = (x.clone().requires_grad_() for x in (case.query_MD, case.doc_ND))
    temperature = torch.tensor(case.temperature, requires_grad=True)
    wide = case.to(torch.float32).options
    options = {**wide, "temperature": temperature}
    with _EagerProducts(case.query_MD.dtype) as products:
        loss, seen = reference_loss(query_MD.float(), doc_ND.float(), case.candidates, **options)
    assert products.count == 3
    gradients = torch.autograd.grad(loss, (query_MD, doc_ND, temperature))
    assert gradients[0].dtype == query_MD.dtype
    return InfoNCEResult(
        loss=loss.detach(),
        d_query_MD=gradients[0],
        d_doc_ND=gradients[1],
        d_temperature=gradients[2],
        observed=seen,
        path=Path.REFERENCE,
    )
