"""The loss by plain products of rounded matrices: what the paths that round are measured by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from loss_cases import Case
from lowmem_cft_kernels import InfoNCEResult, LossOptions, LossPath
from lowmem_cft_kernels.reference import reference_loss


class _Products(TorchFunctionMode):
    """Similarities by a product of the test's."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.multiply, self.count = multiply, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.__matmul__, Tensor.matmul) and args[0].requires_grad:
            self.count += 1
            return self.multiply(*args)
        return func(*args, **(kwargs or {}))


def eagerly(case: Case) -> InfoNCEResult:
    """As a model that runs in 16 bit: 16-bit products and gradients, a float32 cross entropy."""
    dtype = case.query_MD.dtype

    def multiply(x: Tensor, y: Tensor) -> Tensor:
        return (x.to(dtype) @ y.to(dtype)).float()

    query_MD, doc_ND = (x.clone().requires_grad_() for x in (case.query_MD, case.doc_ND))
    temperature = torch.tensor(case.temperature, requires_grad=True)
    wide = case.to(torch.float32).options
    options = LossOptions(**{**wide, "temperature": temperature})
    with _Products(multiply) as products:
        loss, seen = reference_loss(query_MD.float(), doc_ND.float(), case.candidates, options)
    assert products.count == 3
    gradients = torch.autograd.grad(loss, (query_MD, doc_ND, temperature))
    assert gradients[0].dtype == query_MD.dtype
    return InfoNCEResult(
        loss=loss.detach(),
        d_query_MD=gradients[0],
        d_doc_ND=gradients[1],
        d_temperature=gradients[2],
        observed=seen,
        path=LossPath.REFERENCE,
    )


def rounding(case: Case) -> InfoNCEResult:
    """All in float64, but for d loss / d similarity, which is rounded to bfloat16."""

    def multiply(x: Tensor, y: Tensor) -> Tensor:
        product: Tensor = _Rounding.apply(x, y)  # type: ignore[no-untyped-call]
        return product

    with _Products(multiply) as products:
        result = case.to(torch.float64).run(LossPath.REFERENCE)
    assert products.count == 3
    return result


class _Rounding(torch.autograd.Function):
    """A product whose own gradient is rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x @ y

    @staticmethod
    def backward(ctx: Any, d_product: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        rounded = d_product.bfloat16().to(d_product)
        return rounded @ y.T, x.T @ rounded
