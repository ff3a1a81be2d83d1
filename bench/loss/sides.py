"""What is compared: implementations of InfoNCE, each behind the same small interface.

All take the cosine of the given rows (their dot product where `Task.normalize` is off), a fixed
temperature, the first M documents as positives and all N as candidates of every query; `symmetric`
is the mean of that and of the positives choosing among the queries. Where an implementation has a
setting that its users choose, each value is a variant; the fastest correct one stands for it.

Shape suffixes: M query rows, N document columns, D embedding size.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.loss.cases import Task
from lowmem_cft_kernels import ONE_WAY, SYMMETRIC, Candidates, LossPath, choose_path, info_nce

ST_DEFAULT = 32
"""Rows of its mini-batches, of texts and of scores alike, where a user says nothing."""
ST_MINI_BATCHES = (256, 1024, 4096)
"""Others, which take the memory for that many texts in the encoder too."""

Pieces = tuple[list[Tensor], list[Tensor]]
"""Gradients of queries and of documents, each as consecutive rows in one or more tensors."""
Work = Callable[[], Pieces]
"""One forward and backward."""


class Side:
    """One implementation.

    Attributes:
        name: in the table.
        package: what has to be installed to import it, None if it always is.
        cuda_only: it has no CPU code.
        counted: operations show what it allocates; else its memory is not known on a CPU.
    """

    name = ""
    package: str | None = None
    cuda_only = False
    counted = True

    def refuses(self, task: Task) -> str | None:
        """Why it cannot do this; None if it can."""
        return None

    def absent(self, device: torch.device) -> str | None:
        """Why it cannot run here; None if it can."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return "not installed"
        if self.cuda_only and device.type != "cuda":
            return "not run: needs CUDA"
        return None

    def needed_bytes(self, task: Task) -> int:
        """Rough upper bound of what it holds beside the inputs."""
        m, n, d = task.size
        return 8 * (m + n) * d * 4

    def variants(self, task: Task) -> dict[str, Callable[[], Work]]:
        """Name of each variant -> its preparation, which need not be timed."""
        raise NotImplementedError


def by_autograd(task: Task, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Work:
    """The gradients of a loss of queries and documents."""

    def work() -> Pieces:
        leaves = [x.detach().requires_grad_() for x in (task.query_MD, task.doc_ND)]
        d_query_MD, d_doc_ND = torch.autograd.grad(loss_of(*leaves), leaves)
        return [d_query_MD], [d_doc_ND]

    return work


def plain_loss(
    query_MD: Tensor,
    doc_ND: Tensor,
    temperature: float,
    normalize: bool,
    symmetric: bool,
    wide: bool,
) -> Tensor:
    """InfoNCE as it is usually written; `wide` takes 16-bit similarities to float32."""
    if normalize:
        query_MD, doc_ND = F.normalize(query_MD, dim=1), F.normalize(doc_ND, dim=1)
    sim_MN = query_MD @ doc_ND.T
    logit_MN = (sim_MN.float() if wide else sim_MN) / temperature
    target_M = torch.arange(len(query_MD), device=query_MD.device)
    loss = F.cross_entropy(logit_MN, target_M)
    if symmetric:
        loss = (loss + F.cross_entropy(logit_MN[:, : len(query_MD)].T, target_M)) / 2
    return loss


class Eager(Side):
    """Plain PyTorch; at 16 bit with logits of 16 bit, and with logits of 32."""

    name = "eager"

    def loss(self) -> Callable[..., Tensor]:
        return plain_loss

    def needed_bytes(self, task: Task) -> int:
        m, n, _ = task.size
        matrices = 6 if task.symmetric else 4
        return super().needed_bytes(task) + 4 * matrices * m * n

    def variants(self, task: Task) -> dict[str, Callable[[], Work]]:
        loss, wide_by_name = self.loss(), {"float32 logits": True}
        if task.half:
            wide_by_name["16-bit logits"] = False

        def prepare(wide: bool) -> Work:
            options = (task.temperature, task.normalize, task.symmetric, wide)
            return by_autograd(task, lambda query_MD, doc_ND: loss(query_MD, doc_ND, *options))

        return {name: functools.partial(prepare, wide) for name, wide in wide_by_name.items()}


@functools.cache
def compiled_loss() -> Callable[..., Tensor]:
    return torch.compile(plain_loss)


class Compiled(Eager):
    """torch.compile of plain PyTorch, with the defaults; the float32 logits are fused away."""

    name = "compile"
    counted = False

    def loss(self) -> Callable[..., Tensor]:
        return compiled_loss()

    def variants(self, task: Task) -> dict[str, Callable[[], Work]]:
        return {"float32 logits": super().variants(task)["float32 logits"]}


def cached_loss() -> Any:
    """sentence-transformers' class CachedMultipleNegativesRankingLoss."""
    losses = "sentence_transformers.sentence_transformer.losses"
    if importlib.util.find_spec("sentence_transformers.sentence_transformer") is None:
        losses = "sentence_transformers.losses"  # before 6
    return importlib.import_module(losses).CachedMultipleNegativesRankingLoss


class SentenceTransformersLoss(Side):
    """The loss loop of CachedMultipleNegativesRankingLoss, on embeddings as its leaves.

    The embeddings come in mini-batches, as from its first pass over the model; the model is not
    asked for anything. Each mini-batch size is a variant.
    """

    package = "sentence_transformers"

    def __init__(self, name: str, mini_batches: Sequence[int]) -> None:
        self.name, self.mini_batches = name, mini_batches

    def refuses(self, task: Task) -> str | None:
        m, n, _ = task.size
        if n % m:
            return "takes as many hard negatives for each query"
        if task.symmetric and "directions" not in inspect.signature(cached_loss()).parameters:
            return "this version has no directions"
        return None

    def needed_bytes(self, task: Task) -> int:
        rows = min(max(self.mini_batches), task.size[0])
        return super().needed_bytes(task) + 12 * rows * task.size[1] * 4

    def variants(self, task: Task) -> dict[str, Callable[[], Work]]:
        sizes = dict.fromkeys(min(size, task.size[0]) for size in self.mini_batches)
        return {f"mini-batches of {s}": functools.partial(self._prepare, task, s) for s in sizes}

    def _prepare(self, task: Task, size: int) -> Work:
        from sentence_transformers.util import dot_score

        options: dict[str, Any] = {} if task.normalize else {"similarity_fct": dot_score}
        if task.symmetric:
            options["directions"] = ("query_to_doc", "doc_to_query")
            options["partition_mode"] = "per_direction"
        model = nn.Sequential(nn.Identity())  # it looks at the first module when it is made
        loss = cached_loss()(model, scale=1 / task.temperature, mini_batch_size=size, **options)
        columns = [task.query_MD, *torch.split(task.doc_ND, task.size[0])]

        def work() -> Pieces:
            reps = [[x.detach().requires_grad_() for x in torch.split(c, size)] for c in columns]
            loss.calculate_loss(reps, None, with_backward=True)
            grads = [[x.grad for x in column if x.grad is not None] for column in reps]
            return grads[0], [grad for column in grads[1:] for grad in column]

        return work


class MemEff(Side):
    """memeff: the CLIP loss where it is symmetric, the Qwen3 loss without its mask where not."""

    name = "memeff"
    package = "memeff"
    cuda_only = True

    def refuses(self, task: Task) -> str | None:
        if task.size[0] != task.size[1]:
            return "hard negatives are seen by their own query only"
        return None

    def variants(self, task: Task) -> dict[str, Callable[[], Work]]:
        def prepare() -> Work:
            memeff = importlib.import_module("memeff")
            # stable=True would scale the gradient by something else than its derivative
            options = {
                "temperature": task.temperature,
                "normalized_inputs": not task.normalize,
                "stable": False,
            }
            if task.symmetric:
                return by_autograd(task, memeff.MemoryEfficientCLIPLoss(**options))
            # hides what exceeds the positive by the margin, and no two cosines are 3 apart
            return by_autograd(task, memeff.MemoryEfficientQwen3Loss(margin=3.0, **options))

        return {"": prepare}


class RowWise(Side):
    """A loss of rows that choose among columns; symmetric is two of them."""

    cuda_only = True  # but where a subclass says otherwise

    def refuses(self, task: Task) -> str | None:
        if torch.promote_types(task.query_MD.dtype, torch.float32) != torch.float32:
            return f"no {task.query_MD.dtype}"
        return None

    def prepare(
        self, task: Task, row_loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Callable[[], Work]:
        """A variant from the loss of unit rows (R, D), unit columns (C, D) and the rows' targets (R,)."""
        target_M = torch.arange(task.size[0], device=task.query_MD.device)

        def loss_of(query_MD: Tensor, doc_ND: Tensor) -> Tensor:
            query_MD, doc_ND = task.prepared(query_MD), task.prepared(doc_ND)
            loss = row_loss(query_MD, doc_ND, target_M)
            if task.symmetric:
                loss = (loss + row_loss(doc_ND[: len(query_MD)], query_MD, target_M)) / 2
            return loss

        return lambda: by_autograd(task, loss_of)


class TorchLinear(RowWise):
    """torch's own linear_cross_entropy, from 2.13 on: by its formula, and by chunks of rows."""

    name = "torch_linear"
    cuda_only = False

    def absent(self, device: torch.device) -> str | None:
        if not hasattr(F, "linear_cross_entropy"):
            return f"not in torch {torch.__version__}, from 2.13 on"
        return super().absent(device)

    def needed_bytes(self, task: Task) -> int:
        m, n, _ = task.size
        return super().needed_bytes(task) + 4 * 4 * m * n

    def variants(self, task: Task) -> dict[str, Callable[[], Work]]:
        cross_entropy: Any = F.linear_cross_entropy
        chunks: Any = nn.LinearCrossEntropyOptions()

        def row_loss(row_RD: Tensor, col_CD: Tensor, target_R: Tensor, *, options: Any) -> Tensor:
            loss: Tensor = cross_entropy(
                row_RD / task.temperature, col_CD, target_R, options=options
            )
            return loss

        return {
            name: self.prepare(task, functools.partial(row_loss, options=options))
            for name, options in {"formula": None, "chunks": chunks}.items()
        }


class InfCL(RowWise):
    """inf_cl: takes all to float32 and multiplies in tf32."""

    name = "inf_cl"
    package = "inf_cl"

    def refuses(self, task: Task) -> str | None:
        if task.size[2] % 16:
            return "takes multiples of 16 as embedding size"
        return super().refuses(task)

    def variants(self, task: Task) -> dict[str, Callable[[], Work]]:
        cal_inf_loss = importlib.import_module("inf_cl").cal_inf_loss

        head = next(size for size in (256, 128, 64, 32, 16) if task.size[2] % size == 0)
        scale = torch.tensor(1 / task.temperature, device=task.query_MD.device)

        def row_loss(row_RD: Tensor, col_CD: Tensor, target_R: Tensor) -> Tensor:
            loss: Tensor = cal_inf_loss(row_RD, col_CD, target_R, scale, head)
            return loss

        return {"": self.prepare(task, row_loss)}


class CutCrossEntropy(RowWise):
    """cut-cross-entropy; with and without leaving out what is small in the gradient."""

    name = "cce"
    package = "cut_cross_entropy"

    def refuses(self, task: Task) -> str | None:
        return None if task.half else "differentiates 16-bit inputs only"

    def variants(self, task: Task) -> dict[str, Callable[[], Work]]:
        cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy

        def row_loss(
            row_RD: Tensor, col_CD: Tensor, target_R: Tensor, *, filter_eps: str | None
        ) -> Tensor:
            loss: Tensor = cross_entropy(
                row_RD / task.temperature, col_CD, target_R, filter_eps=filter_eps
            )
            return loss

        filters = {"filtered": "auto", "not filtered": None}
        return {
            name: self.prepare(task, functools.partial(row_loss, filter_eps=value))
            for name, value in filters.items()
        }


class Liger(RowWise):
    """liger-kernel's fused linear cross entropies: queries are the input, documents the weight.

    The scaled one takes the temperature; on Hopper it needs nvidia-cutlass-dsl.
    """

    name = "liger"
    package = "liger_kernel"

    def variants(self, task: Task) -> dict[str, Callable[[], Work]]:
        liger = importlib.import_module("liger_kernel.transformers")

        losses = {"": liger.LigerFusedLinearCrossEntropyLoss()}
        if task.half:
            wide = liger.LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
            losses = {"16-bit accumulator": losses[""], "float32 accumulator": wide}

        def row_loss(row_RD: Tensor, col_CD: Tensor, target_R: Tensor, *, loss: Any) -> Tensor:
            value: Tensor = loss(col_CD, row_RD / task.temperature, target_R)
            return value

        variants = {
            name: self.prepare(task, functools.partial(row_loss, loss=loss))
            for name, loss in losses.items()
        }
        return variants | {"scaled": functools.partial(self._prepare_scaled, task)}

    def _prepare_scaled(self, task: Task) -> Work:
        ops = importlib.import_module("liger_kernel.ops")
        scaled: Any = ops.LigerFusedLinearScaledCrossEntropyFunction

        def row_loss(row_RD: Tensor, col_CD: Tensor, target_R: Tensor) -> Tensor:
            loss_R: Tensor = scaled.apply(row_RD, col_CD, target_R, task.temperature)
            return loss_R.mean()

        return self.prepare(task, row_loss)()


class Ours(Side):
    """lowmem_cft_kernels.info_nce, on the path it chooses itself or on a given one."""

    def __init__(self, path: LossPath | None = None) -> None:
        self.path = path
        self.name = "ours" if path is None else f"ours_{path.value}"
        self.cuda_only = path is LossPath.TRITON

    def needed_bytes(self, task: Task) -> int:
        m, n, _ = task.size
        matrices = 12 if self.path is LossPath.REFERENCE else 0
        return super().needed_bytes(task) + 4 * matrices * (m + n) ** 2

    def variants(self, task: Task) -> dict[str, Callable[[], Work]]:
        path = self.path or choose_path(task.query_MD, task.doc_ND)
        candidates = Candidates(target=torch.arange(task.size[0], device=task.query_MD.device))
        softmaxes = SYMMETRIC if task.symmetric else ONE_WAY

        def work(workspace_bytes: int | None) -> Pieces:
            result = info_nce(
                task.query_MD,
                task.doc_ND,
                candidates,
                temperature=task.temperature,
                softmaxes=softmaxes,
                normalize=task.normalize,
                path=path,
                workspace_bytes=workspace_bytes,
            )
            return [result.d_query_MD], [result.d_doc_ND]

        works: dict[str, Callable[[], Work]] = {path.value: lambda: functools.partial(work, None)}
        if path is LossPath.TRITON:  # and as the trainer has it where its card has room
            works[f"{path.value}, 512 MiB"] = lambda: functools.partial(work, 2**29)
        return works


def make_sides(
    paths: Sequence[LossPath] = (), mini_batches: Sequence[int] = ST_MINI_BATCHES
) -> list[Side]:
    """All of them; `paths` are of ours, beside the one it chooses itself."""
    return [
        Ours(),
        *(Ours(path) for path in paths),
        Eager(),
        Compiled(),
        SentenceTransformersLoss("st", [ST_DEFAULT]),
        SentenceTransformersLoss("st-best", mini_batches),
        TorchLinear(),
        MemEff(),
        InfCL(),
        CutCrossEntropy(),
        Liger(),
    ]
