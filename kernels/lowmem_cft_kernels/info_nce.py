"""The public calls: validate, choose a path, give the loss with or without its gradients."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowmem_cft_kernels import chunked, tiles
from lowmem_cft_kernels.masks import Candidates
from lowmem_cft_kernels.options import (
    ONE_WAY,
    Bank,
    Direction,
    FalseNegatives,
    Hardness,
    Products,
    Softmax,
    check_shapes,
    check_softmaxes,
)
from lowmem_cft_kernels.problem import Problem, make_problem
from lowmem_cft_kernels.reference import reference_loss
from lowmem_cft_kernels.result import InfoNCEResult, LossPath
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
        temperature: > 0, a number or a scalar tensor; similarities are divided by it. The value
            of one on a GPU is not looked at.
        softmaxes: which comparisons share a denominator; the loss is the mean over softmaxes.
            `ONE_WAY`, `SYMMETRIC`, `GTE`, `QWEN3`, or others (`options.Direction`).
        false_negatives: hides candidates about as similar as the positive.
        hardness: raises the weight of similar negatives.
        weight_M: floats (M,) >= 0; the loss is the weighted mean over queries. A query without a
            positive, or with weight 0, adds nothing. Where none is left, loss and gradients are 0.
            On a GPU, values are not looked at.
        bank: documents without a gradient.
        normalize: take cosines: the gradient is then that of the raw inputs.
        products: how the Triton path multiplies float32 inputs. `SPLIT_BF16` (float32 alone, on CUDA
            from compute capability 8.0 on) does it on tensor cores, and holds what
            `split.split_bytes` gives beside the workspace: O((M + N) D). Other paths always
            compute exactly.
        path: how to compute it; chosen by device, dtype and size if None (see `choose_path`).
        workspace_bytes: bound on what is held besides inputs, gradients and a few numbers per
            query and document, 60 MiB if None; does not change the result beyond rounding.
            Embeddings whose rows have gaps between their elements are copied besides.
        out: (M, D) and (N, D) to write the gradients to, in the dtype they would have, so that
            views of one buffer can be filled without a copy.

    Raises:
        ValueError: shapes, dtypes, indices or options do not fit, or the path cannot do them.
    """
    _validate_devices(query_MD, doc_ND, candidates, false_negatives, bank, weight_M)
    _validate(query_MD, doc_ND, candidates, temperature, softmaxes)
    _validate_products(query_MD, products)
    check_shapes(query_MD, doc_ND, false_negatives, bank, weight_M)
    if bank is not None and not any(Direction.QUERY_TO_DOC in one for one in softmaxes):
        raise ValueError("bank: got one, but no softmax has query_to_doc in it")
    compute = torch.promote_types(query_MD.dtype, torch.float32)
    if out is None:
        out = (
            torch.empty_like(query_MD, dtype=compute, memory_format=torch.contiguous_format),
            torch.empty_like(doc_ND, dtype=compute, memory_format=torch.contiguous_format),
        )
    _validate_out(query_MD, doc_ND, out)
    path = path or choose_path(query_MD, doc_ND)
    if path is LossPath.TRITON and (reason := why_not_triton(query_MD)) is not None:
        raise ValueError(f"path: got {path.value}, but {reason}; use {LossPath.CHUNKED.value}")
    scale = _as_scalar(temperature, query_MD.new_empty((), dtype=compute))
    query_MD, doc_ND = _in_rows(query_MD.detach()), _in_rows(doc_ND.detach())
    candidates = _in_rows(candidates)
    options: dict[str, Any] = {
        "softmaxes": softmaxes,
        "false_negatives": _in_rows(false_negatives),
        "hardness": hardness,
        "weight_M": _in_rows(weight_M),
        "bank": _in_rows(bank),
        "normalize": normalize,
    }
    if path is LossPath.REFERENCE:
        with full_precision(query_MD.device.type):
            return _by_autograd(query_MD, doc_ND, candidates, scale, options, out)
    with torch.no_grad(), full_precision(query_MD.device.type):
        problem = make_problem(query_MD, doc_ND, candidates, temperature=scale, **options)
        work = _worker(path, problem, out, workspace_bytes, products)
        loss, d_temperature = work.run()
        num_seeable = len(doc_ND) + (0 if bank is None else len(bank.doc_CD))
        observed = work.tally.observed(problem, num_seeable)
    return InfoNCEResult(
        loss=loss,
        d_query_MD=out[0],
        d_doc_ND=out[1],
        d_temperature=d_temperature,
        observed=observed,
        path=path,
    )


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
    loss: Tensor = _InfoNCE.apply(query_MD, doc_ND, temperature, candidates, options)  # type: ignore[no-untyped-call]
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
        options: dict[str, Any],
    ) -> Tensor:
        result = info_nce(query_MD, doc_ND, candidates, temperature=temperature, **options)
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
        wanted = (
            gradient * d_loss.to(gradient) if needed else None
            for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        )
        return (*wanted, None, None)


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


def _in_rows(held: Any) -> Any:
    """Vectors and integers contiguous, embeddings without gaps in their rows; what is so as it is.

    Of a tensor, of those that a dataclass holds, or of None. A kernel's pointer knows no strides
    but those of an embedding's rows.
    """
    if held is None:
        return None
    if isinstance(held, Tensor):
        embeddings = held.ndim == 2 and held.is_floating_point()
        return held if embeddings and held.stride(1) == 1 else held.contiguous()
    values = {field.name: getattr(held, field.name) for field in fields(held)}
    return replace(held, **{name: _in_rows(x) for name, x in values.items() if torch.is_tensor(x)})


def _worker(
    path: LossPath,
    problem: Problem,
    out: tuple[Tensor, Tensor],
    workspace_bytes: int | None,
    products: Products,
) -> chunked.Chunked | Fused:
    if path is LossPath.CHUNKED:
        return chunked.Chunked(
            problem, *out, workspace_bytes or chunked.Chunked.default_workspace_bytes
        )
    from lowmem_cft_kernels.triton_info_nce import Fused  # not where triton is missing

    return Fused(problem, *out, workspace_bytes or Fused.default_workspace_bytes, products)


def _validate(
    query_MD: Tensor,
    doc_ND: Tensor,
    candidates: Candidates,
    temperature: float | Tensor,
    softmaxes: Sequence[Softmax],
) -> None:
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
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(
            f"temperature: got a tensor {tuple(temperature.shape)}, wanted a number or a scalar"
        )
    # a temperature on the GPU is not looked at: that would wait for all that is queued there
    if not isinstance(temperature, Tensor) or temperature.device.type == "cpu":
        value = float(temperature.detach() if isinstance(temperature, Tensor) else temperature)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"temperature: got {value}, wanted a finite number above 0")
    check_softmaxes(softmaxes)
    candidates.validate(query_MD.shape[0], doc_ND.shape[0])


def _validate_products(query_MD: Tensor, products: Products) -> None:
    if not isinstance(products, Products):
        raise ValueError(f"products: got {products!r}, wanted of {[one.value for one in Products]}")
    if products is Products.EXACT:
        return
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


def _validate_devices(query_MD: Tensor, doc_ND: Tensor, *given: object) -> None:
    tensors: dict[str, object] = {"doc_ND": doc_ND}
    for one in given:
        tensors |= (
            {"weight_M": one} if isinstance(one, Tensor) else vars(one) if one is not None else {}
        )
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device != query_MD.device:
            raise ValueError(
                f"{name}: got it on {tensor.device}, wanted it where query_MD is, on "
                f"{query_MD.device}"
            )


def _validate_out(query_MD: Tensor, doc_ND: Tensor, out: tuple[Tensor, Tensor]) -> None:
    wanted = torch.promote_types(query_MD.dtype, torch.float32)
    for given, like in zip(out, (query_MD, doc_ND), strict=True):
        if given.shape != like.shape or given.dtype != wanted or given.device != like.device:
            raise ValueError(
                f"out: got {given.dtype} {tuple(given.shape)} on {given.device}, "
                f"wanted {wanted} {tuple(like.shape)} on {like.device}"
            )


def _by_autograd(
    query_MD: Tensor,
    doc_ND: Tensor,
    candidates: Candidates,
    temperature: Tensor,
    options: dict[str, Any],
    out: tuple[Tensor, Tensor],
) -> InfoNCEResult:
    leaves = [query_MD.to(out[0].dtype), doc_ND.to(out[1].dtype), temperature]
    query_MD, doc_ND, temperature = (leaf.clone().requires_grad_() for leaf in leaves)
    if (bank := options["bank"]) is not None:
        doc_CD = bank.doc_CD.to(out[1].dtype)
        options["bank"] = Bank(doc_CD=doc_CD, keys_C=bank.keys_C, guide_CG=bank.guide_CG)
    with torch.enable_grad():
        loss, observed = reference_loss(
            query_MD, doc_ND, candidates, temperature=temperature, **options
        )
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
