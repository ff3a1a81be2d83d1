"""The public calls: validate, choose a path, give the loss with or without its gradients."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowmem_cft_kernels import tiles
from lowmem_cft_kernels.chunked import Chunked
from lowmem_cft_kernels.masks import Candidates
from lowmem_cft_kernels.options import (
    ONE_WAY,
    Bank,
    FalseNegatives,
    Hardness,
    LossOptions,
    LossPath,
    Products,
    Softmax,
)
from lowmem_cft_kernels.problem import Problem, make_problem
from lowmem_cft_kernels.reference import reference_loss
from lowmem_cft_kernels.result import InfoNCEResult
from lowmem_cft_kernels.surroundings import full_precision, why_triton_cannot_start

if TYPE_CHECKING:
    from lowmem_cft_kernels.triton_info_nce import Fused

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def info_nce(
    query_MD: Tensor,
    doc_ND: Tensor,
    candidates: Candidates,
    *,
    temperature: float | Tensor,
    softmaxes: Sequence[Softmax] = ONE_WAY,
    false_negatives: FalseNegatives | None = None,
    hardness: Hardness | None = None,
    weight_M: Tensor | None = None,
    bank: Bank | None = None,
    normalize: bool = False,
    products: Products = Products.EXACT,
    path: LossPath | None = None,
    workspace_bytes: int | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> InfoNCEResult:
    """InfoNCE loss and its gradients in one call; nothing is kept for a backward pass.

    `reference.reference_loss` is its definition. Logits are computed and kept in float32 (float64
    for float64 inputs), whatever the inputs are. On a GPU, the host waits for nothing that is
    queued, unless nobody has looked at the values of the candidates (see `Candidates.validate`).

    Args:
        query_MD: (M, D), float16, bfloat16, float32 or float64.
        doc_ND: (N, D), same dtype and device: positives and hard negatives together.
        candidates: each query's positives and which documents it sees.
        out: (M, D) and (N, D) to write the gradients to, in the dtype they would have, so that
            views of one buffer can be filled without a copy.

    The other arguments are those of `LossOptions`.

    Raises:
        ValueError: shapes, dtypes, indices or options do not fit, or the path cannot do them.
    """
    options = LossOptions(
        temperature=temperature,
        softmaxes=softmaxes,
        false_negatives=false_negatives,
        hardness=hardness,
        weight_M=weight_M,
        bank=bank,
        normalize=normalize,
        products=products,
        path=path,
        workspace_bytes=workspace_bytes,
    )
    return value_and_gradients(query_MD, doc_ND, candidates, options, out)


def info_nce_loss(
    query_MD: Tensor,
    doc_ND: Tensor,
    candidates: Candidates,
    *,
    temperature: float | Tensor,
    **options: Any,
) -> Tensor:
    """The loss alone, differentiable in queries, documents and a temperature tensor.

    The gradients are computed with the value and held until the backward pass, which scales them:
    M x D and N x D numbers, no logits. Arguments as in `info_nce`, `out` apart.
    """
    given = LossOptions(temperature=temperature, **options)
    loss: Tensor = _InfoNCE.apply(query_MD, doc_ND, temperature, candidates, given)  # type: ignore[no-untyped-call]
    return loss


class _InfoNCE(torch.autograd.Function):
    """`info_nce` with its gradients kept for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        query_MD: Tensor,
        doc_ND: Tensor,
        temperature: float | Tensor,
        candidates: Candidates,
        options: LossOptions,
    ) -> Tensor:
        result = value_and_gradients(query_MD, doc_ND, candidates, options)
        gradients = [result.d_query_MD, result.d_doc_ND, result.d_temperature]
        if isinstance(temperature, Tensor):
            gradients[2] = gradients[2].to(temperature).view_as(temperature)
        if query_MD.dtype == torch.bfloat16:
            gradients[:2] = [gradient.bfloat16() for gradient in gradients[:2]]
        # float16 has no room for them before the loss is scaled: autograd rounds them after
        ctx.save_for_backward(*gradients)
        return result.loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # what is held is a constant: it would be left out in silence
            raise RuntimeError("info_nce_loss: got create_graph=True, has no second derivative")
        scaled = (
            gradient * d_loss.to(gradient) if needed else None
            for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        )
        return (*scaled, None, None)


def value_and_gradients(
    query_MD: Tensor,
    doc_ND: Tensor,
    candidates: Candidates,
    options: LossOptions,
    out: tuple[Tensor, Tensor] | None = None,
) -> InfoNCEResult:
    """`info_nce` of options that are made already."""
    _validate(query_MD, doc_ND, candidates, options)
    compute = torch.promote_types(query_MD.dtype, torch.float32)
    if out is None:
        out = (
            torch.empty_like(query_MD, dtype=compute, memory_format=torch.contiguous_format),
            torch.empty_like(doc_ND, dtype=compute, memory_format=torch.contiguous_format),
        )
    _validate_out(query_MD, doc_ND, out)
    path = options.path or choose_path(query_MD, doc_ND)
    if path is LossPath.TRITON and (reason := why_not_triton(query_MD)) is not None:
        raise ValueError(f"path: got {path.value}, but {reason}; use {LossPath.CHUNKED.value}")
    temperature = _as_scalar(options.temperature, query_MD.new_empty((), dtype=compute))
    query_MD, doc_ND = _in_rows(query_MD.detach()), _in_rows(doc_ND.detach())
    candidates, options = _in_rows(candidates), _in_rows(options)
    options = replace(options, temperature=temperature, path=path)
    with full_precision(query_MD.device.type):
        if path is LossPath.REFERENCE:
            return _by_autograd(query_MD, doc_ND, candidates, options, out)
        with torch.no_grad():
            return _by_kernels(path, make_problem(query_MD, doc_ND, candidates, options), out)


def _by_kernels(path: LossPath, problem: Problem, out: tuple[Tensor, Tensor]) -> InfoNCEResult:
    work: Chunked | Fused
    if path is LossPath.CHUNKED:
        work = Chunked(problem, *out)
    else:
        from lowmem_cft_kernels.triton_info_nce import Fused  # not where triton is missing

        work = Fused(problem, *out)
    loss, d_temperature = work.run()
    return InfoNCEResult(
        loss=loss,
        d_query_MD=out[0],
        d_doc_ND=out[1],
        d_temperature=d_temperature,
        observed=work.tally.observed(problem),
        path=path,
    )


def _by_autograd(
    query_MD: Tensor,
    doc_ND: Tensor,
    candidates: Candidates,
    options: LossOptions,
    out: tuple[Tensor, Tensor],
) -> InfoNCEResult:
    temperature = torch.as_tensor(options.temperature)
    leaves = (query_MD.to(out[0].dtype), doc_ND.to(out[1].dtype), temperature)
    query_MD, doc_ND, temperature = (leaf.clone().requires_grad_() for leaf in leaves)
    if (bank := options.bank) is not None:
        bank = replace(bank, doc_CD=bank.doc_CD.to(out[1].dtype))
    options = replace(options, temperature=temperature, bank=bank)
    with torch.enable_grad():
        loss, observed = reference_loss(query_MD, doc_ND, candidates, options)
        d_query_MD, d_doc_ND, d_temperature = torch.autograd.grad(
            loss, (query_MD, doc_ND, temperature)
        )
    return InfoNCEResult(
        loss=loss.detach(),
        d_query_MD=out[0].copy_(d_query_MD),
        d_doc_ND=out[1].copy_(d_doc_ND),
        d_temperature=d_temperature,
        observed=observed,
        path=LossPath.REFERENCE,
    )


def choose_path(query_MD: Tensor, doc_ND: Tensor) -> LossPath:
    """The path that `info_nce` takes for such inputs."""
    if query_MD.is_cuda and doc_ND.is_cuda and why_not_triton(query_MD) is None:
        return LossPath.TRITON
    return LossPath.CHUNKED


def why_not_triton(query_MD: Tensor) -> str | None:
    """What keeps the Triton path from such inputs; None if nothing does."""
    if query_MD.dtype == torch.float64:
        return "it has no float64"
    if not query_MD.is_cuda:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        from lowmem_cft_kernels.triton_info_nce import interpreted

        return None if interpreted() else f"it needs CUDA, and the inputs are on {query_MD.device}"
    if torch.version.hip is not None:
        return "it is untested on ROCm"
    major, minor = torch.cuda.get_device_capability(query_MD.device)
    if (major, minor) < (7, 5):
        return f"it needs compute capability 7.5, and the device has {major}.{minor}"
    if query_MD.dtype == torch.bfloat16 and major < 8:
        return f"bfloat16 needs compute capability 8.0, and the device has {major}.{minor}"
    return why_triton_cannot_start()


def _as_scalar(temperature: float | Tensor, like: Tensor) -> Tensor:
    """() where `like` is and in its dtype; a number of the host is filled in, not copied."""
    if isinstance(temperature, Tensor) and temperature.device.type != "cpu":
        return temperature.detach().to(like).view(())
    value = temperature.detach() if isinstance(temperature, Tensor) else temperature
    return torch.full_like(like, float(value))


def _in_rows(value: Any) -> Any:
    """Vectors and integers contiguous, embeddings without gaps in their rows; what is so as it is.

    Of a tensor, or of all tensors that a dataclass holds. A kernel's pointer knows no strides but
    those of an embedding's rows.
    """
    if isinstance(value, Tensor):
        is_embedding = value.ndim == 2 and value.is_floating_point()
        return value if is_embedding and value.stride(1) == 1 else value.contiguous()
    if not is_dataclass(value) or isinstance(value, type):
        return value
    names = [field.name for field in fields(value) if field.init]
    return replace(value, **{name: _in_rows(getattr(value, name)) for name in names})


def _validate(
    query_MD: Tensor, doc_ND: Tensor, candidates: Candidates, options: LossOptions
) -> None:
    _validate_devices(query_MD, doc_ND, candidates, options)
    if query_MD.ndim != 2 or doc_ND.ndim != 2 or query_MD.shape[1] != doc_ND.shape[1]:
        raise ValueError(
            f"got queries {tuple(query_MD.shape)} and documents {tuple(doc_ND.shape)}, "
            "wanted (M, D) and (N, D) with one D"
        )
    if query_MD.dtype != doc_ND.dtype or query_MD.dtype not in DTYPES:
        raise ValueError(
            f"got {query_MD.dtype} queries and {doc_ND.dtype} documents, wanted one floating dtype"
        )
    if not query_MD.shape[0] or not doc_ND.shape[0]:
        raise ValueError("got no queries or no documents, wanted at least one of each")
    options.validate(query_MD, doc_ND)
    candidates.validate(query_MD.shape[0], doc_ND.shape[0])
    if options.products is not Products.EXACT:
        _validate_products(query_MD, options.products)


def _validate_products(query_MD: Tensor, products: Products) -> None:
    if query_MD.dtype != torch.float32:
        raise ValueError(
            f"products: got {products.value} for {query_MD.dtype}, wanted float32 inputs; use "
            f"{Products.EXACT.value}"
        )
    if (capability := tiles.capability_of(query_MD.device)) < 80:
        raise ValueError(
            f"products: got {products.value}, which needs compute capability 8.0, and the device "
            f"has {capability / 10}; use {Products.EXACT.value}"
        )


def _validate_devices(
    query_MD: Tensor, doc_ND: Tensor, candidates: Candidates, options: LossOptions
) -> None:
    tensors: dict[str, object] = {"doc_ND": doc_ND, "weight_M": options.weight_M}
    for holder in (candidates, options.false_negatives, options.bank):
        tensors |= {} if holder is None else vars(holder)
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device != query_MD.device:
            raise ValueError(
                f"{name}: got it on {tensor.device}, wanted it where query_MD is, on "
                f"{query_MD.device}"
            )


def _validate_out(query_MD: Tensor, doc_ND: Tensor, out: tuple[Tensor, Tensor]) -> None:
    dtype = torch.promote_types(query_MD.dtype, torch.float32)
    for given, like in zip(out, (query_MD, doc_ND), strict=True):
        if given.shape != like.shape or given.dtype != dtype or given.device != like.device:
            raise ValueError(
                f"out: got {given.dtype} {tuple(given.shape)} on {given.device}, "
                f"wanted {dtype} {tuple(like.shape)} on {like.device}"
            )
