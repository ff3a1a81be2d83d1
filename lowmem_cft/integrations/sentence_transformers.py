"""InfoNCE for sentence-transformers' own trainer, in a bounded workspace whatever the batch.

`InfoNCELoss` stands where MultipleNegativesRankingLoss does, and `CachedInfoNCELoss` where
CachedMultipleNegativesRankingLoss does:

    from lowmem_cft.integrations.sentence_transformers import CachedInfoNCELoss

    loss = CachedInfoNCELoss(model, temperature=0.05, mini_batch_size=32)
    SentenceTransformerTrainer(model=model, train_dataset=triplets, loss=loss).train()

The columns of the data set are anchors, positives and any number of hard negatives, in this order.
The temperature is 1 / their scale. Losses that are made of others (MatryoshkaLoss) take these too.

Shape suffixes: M rows of a batch, N documents (positives, then hard negatives column by column), S
texts of a batch (anchors, then documents), C columns of texts, D embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lowmem_cft.data.batches import Positives
from lowmem_cft_kernels import (
    ONE_WAY,
    SOFTMAXES,
    Candidates,
    Direction,
    FalseNegatives,
    Hardness,
    Negatives,
    Products,
    Softmax,
    info_nce,
    info_nce_loss,
)
from lowmem_cft_kernels.masks import SHARED
from lowmem_cft_kernels.options import check_softmaxes

try:
    from sentence_transformers.base.losses import CachedLossMixin, has_static_embedding_input
    from sentence_transformers.base.losses.merged_forward import embed_columns
except ImportError as error:
    try:
        installed = f"sentence-transformers {version('sentence-transformers')}"
    except PackageNotFoundError:
        installed = "no sentence-transformers"
    raise ImportError(
        f"got {installed} ({error}), wanted 6.0 or newer, from which on other losses may cache "
        "gradients with its own: pip install 'lowmem-cft[sentence-transformers]'"
    ) from error

Columns = list[dict[str, Any]]
"""What the trainer gives a loss: for each column of texts, their token ids and what goes with them."""

Value = TypeVar("Value")


class InfoNCELoss(nn.Module):
    """In place of MultipleNegativesRankingLoss: the same value and gradient, no M x N matrix.

    `lowmem_cft_kernels.info_nce` computes it, with Triton on a GPU and in blocks on a CPU; the
    embeddings are theirs to compute. In a distributed run each process has the loss of its own batch.

    Args:
        model: a SentenceTransformer.
        temperature: > 0; similarities are divided by it.
        softmaxes: which comparisons share a denominator: `ONE_WAY`, `SYMMETRIC`, `GTE`, `QWEN3` of
            `lowmem_cft_kernels`, or "one_way", "symmetric", "gte", "qwen3"; or sets of directions
            (`Direction` or their names). Their `directions` are one set if "joint", else one each.
        false_negatives: hides negatives about as similar as the positive; without guides, which
            belong to one batch. As a value or as its fields.
        hardness: raises the weight of similar negatives. As a value or as its fields.
        normalize: similarities are cosines, whatever the norms of the embeddings; else dot products.
        own_only: an anchor sees every row's positive, but its own row's hard negatives only.
        mask_duplicates: a document with the text of a positive of the anchor, in whichever row of
            the batch, or of the anchor is no negative of that anchor; equal anchors, and positives
            of one anchor, are no negatives of each other. That is what our trainer does, and theirs
            leaves to a sampler without duplicates (which keeps such rows out of a batch, and is not
            needed with this). A text is its token ids without padding, its prompt included, as it
            is what the model is given: texts that differ only where they are cut off are equal, and
            so are their embeddings; an anchor with a prompt is not a document without. The ids are
            read by the host, which waits for the device once a step.
        products: how a GPU multiplies float32 embeddings; "split-bf16" takes tensor cores.
        workspace_bytes: what the loss may hold besides embeddings and gradients, 60 MiB if None; on
            a large GPU more is faster. It changes the result by rounding only.

    Raises:
        ValueError: an option is none of these.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 0.05,
        softmaxes: str | Sequence[Iterable[Direction | str]] = ONE_WAY,
        *,
        false_negatives: FalseNegatives | Mapping[str, Any] | None = None,
        hardness: Hardness | Mapping[str, Any] | None = None,
        normalize: bool = True,
        own_only: bool = False,
        mask_duplicates: bool = True,
        products: Products | str = Products.EXACT,
        workspace_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"temperature: got {temperature}, wanted a finite number above 0, which is 1 / scale"
            )
        self.model = model
        self.temperature = temperature
        self.softmaxes = _softmaxes(softmaxes)
        self.false_negatives = _false_negatives(false_negatives)
        self.hardness = _hardness(hardness)
        self.normalize = normalize
        self.own_only = own_only
        self.mask_duplicates = mask_duplicates
        self.products = _member(Products, products, "products")
        self.workspace_bytes = workspace_bytes

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            sentence_features: anchors, positives and hard negatives, M texts each.
            labels: not looked at.

        Raises:
            ValueError: fewer than two columns, or duplicates to be masked among what is no text.
        """
        columns, keys_CM = self._read(sentence_features)
        emb = embed_columns(self.model, columns)
        return info_nce_loss(
            emb[0], torch.cat(emb[1:]), self._candidates(emb, keys_CM), **self._options
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments as plain values, for the model card; they make an equal loss."""
        hides, weighs = self.false_negatives, self.hardness
        return {
            "temperature": self.temperature,
            "softmaxes": _plain_softmaxes(self.softmaxes),
            "false_negatives": hides and {"margin": hides.margin, "relative": hides.relative},
            "hardness": weighs and {"strength": weighs.strength, "on": weighs.on.value},
            "normalize": self.normalize,
            "own_only": self.own_only,
            "mask_duplicates": self.mask_duplicates,
            "products": self.products.value,
            "workspace_bytes": self.workspace_bytes,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the papers that the loss comes from, for the model card."""
        papers = [paper for name, paper in _PAPERS.items() if SOFTMAXES[name] == self.softmaxes]
        return "\n".join([_CPC, *papers])

    def _read(self, sentence_features: Iterable[dict[str, Any]]) -> tuple[Columns, Tensor | None]:
        """The columns, and their texts' keys where duplicates are masked.

        Before a forward pass: modules change what they are given in place.
        """
        columns = list(sentence_features)
        if len(columns) < 2:
            raise ValueError(
                f"got {len(columns)} column of texts, wanted anchors, positives and any number of "
                "hard negatives; columns go by their order: dataset.select_columns([...])"
            )
        return columns, text_keys(columns) if self.mask_duplicates else None

    def _candidates(self, emb: Sequence[Tensor], keys_CM: Tensor | None) -> Candidates:
        """For one tensor of M embeddings a column."""
        num_rows, num_negatives = len(emb[0]), len(emb) - 2
        index_M = torch.arange(num_rows)
        keys = {} if keys_CM is None else self._keys(keys_CM)
        candidates = Candidates(
            target=index_M,
            owner_N=torch.cat([torch.full_like(index_M, SHARED), index_M.repeat(num_negatives)]),
            own_only=self.own_only,
            **keys,
        )
        # looked at before they are on a GPU, which would be waited for
        candidates.validate(num_rows, sum(len(column) for column in emb[1:]))
        return candidates.to(emb[0].device)

    def _keys(self, keys_CM: Tensor) -> dict[str, Tensor]:
        """The keys of `Candidates`: which texts are no negatives of each row's anchor."""
        anchor_M, positive_M = keys_CM[0].numpy(), keys_CM[1].numpy()
        keys = Positives.of_pairs(anchor_M, positive_M).keys(
            anchor_M,
            positive_M,
            keys_CM[1:].flatten().numpy(),
            both_ways=self.softmaxes != ONE_WAY,
        )
        return {name: torch.from_numpy(key) for name, key in keys.items()}

    @property
    def _options(self) -> dict[str, Any]:
        """As arguments of `info_nce`."""
        return {
            "temperature": self.temperature,
            "softmaxes": self.softmaxes,
            "false_negatives": self.false_negatives,
            "hardness": self.hardness,
            "normalize": self.normalize,
            "products": self.products,
            "workspace_bytes": self.workspace_bytes,
        }


class CachedInfoNCELoss(CachedLossMixin, InfoNCELoss):  # type: ignore[misc]
    """In place of CachedMultipleNegativesRankingLoss: `InfoNCELoss` over any batch, in the encoder's
    memory for one mini-batch.

    Embedding, replaying what is random and going back are their CachedLossMixin's; the loss between
    the two passes is one call that gives the gradients of all embeddings. Beside its workspace it
    holds S D numbers three times: as mini-batches, as one, and as gradients. Neither value nor
    gradient depends on the mini-batches.

    Args:
        mini_batch_size: texts that are embedded at a time.
        mini_batch_num_tokens: pack mini-batches up to so many tokens in place of so many texts.
        show_progress_bar: over the mini-batches of each step.
        options: those of `InfoNCELoss`.

    Raises:
        ValueError: as there, or the model's inputs cannot be cut into mini-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 0.05,
        softmaxes: str | Sequence[Iterable[Direction | str]] = ONE_WAY,
        *,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, temperature, softmaxes, **options)
        if has_static_embedding_input(model):
            raise ValueError(
                "got a model with a StaticEmbedding, whose inputs cannot be cut into mini-batches; "
                "use InfoNCELoss"
            )
        for name, size in (
            ("mini_batch_size", mini_batch_size),
            ("mini_batch_num_tokens", mini_batch_num_tokens),
        ):
            if size is not None and size < 1:
                raise ValueError(f"{name}: got {size}, wanted 1 or more")
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """As `InfoNCELoss.forward`."""
        columns, keys_CM = self._read(sentence_features)
        loss: Tensor = self.forward_cached(columns, keys_CM)  # type: ignore[operator]
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The mix-in's hook: the loss from the embeddings.

        Args:
            reps: each column's mini-batches, (mini-batch, D); with_backward puts their gradients
                into `.grad`, in float32 at least.
            labels: the texts' keys (`text_keys`), which the mix-in passes on; None masks nothing.
        """
        emb = [torch.cat(mini_batches) for mini_batches in reps]
        candidates = self._candidates(emb, labels)
        num_rows, doc_ND = len(emb[0]), torch.cat(emb[1:])
        if not with_backward:
            return info_nce_loss(emb[0], doc_ND, candidates, **self._options)
        dtype = torch.promote_types(doc_ND.dtype, torch.float32)
        d_emb_SD = doc_ND.new_empty((num_rows + len(doc_ND), doc_ND.shape[1]), dtype=dtype)
        out = d_emb_SD[:num_rows], d_emb_SD[num_rows:]
        result = info_nce(emb[0], doc_ND, candidates, **self._options, out=out)
        leaves = [leaf for mini_batches in reps for leaf in mini_batches]
        pieces = torch.split(d_emb_SD, [len(leaf) for leaf in leaves])
        for leaf, piece in zip(leaves, pieces, strict=True):
            assert leaf.grad is None
            leaf.grad_dtype = dtype  # float16 has no room for gradients before the loss is scaled
            leaf.grad = piece
        return result.loss

    def get_config_dict(self) -> dict[str, Any]:
        """As `InfoNCELoss.get_config_dict`."""
        return {
            **super().get_config_dict(),
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }

    @property
    def citation(self) -> str:
        """As `InfoNCELoss.citation`."""
        return f"{super().citation}\n{_GRADCACHE}"


def text_keys(columns: Sequence[Mapping[str, Any]]) -> Tensor:
    """int64 (C, M) on the CPU: two are equal where the texts' token ids are.

    Raises:
        ValueError: a column holds no texts, or not only texts.
    """
    numbers: dict[bytes, int] = {}
    keys = [[numbers.setdefault(text, len(numbers)) for text in _texts(c)] for c in columns]
    return torch.tensor(keys)


def _texts(column: Mapping[str, Any]) -> list[bytes]:
    """Token ids of each text, without padding: of a padded batch, or of one without gaps."""
    kind = column.get("modality", "text")
    if kind != "text" or "input_ids" not in column:
        what = kind if kind != "text" else f"no token ids, but {sorted(column)}"
        raise ValueError(
            f"mask_duplicates: got a column of {what}, wanted texts, which their token ids tell "
            "apart; use mask_duplicates=False"
        )
    ids = column["input_ids"].cpu().numpy()
    if "cu_seq_lens_q" in column:  # 0, ends
        texts = np.split(ids.reshape(-1), column["cu_seq_lens_q"].cpu()[1:-1])
    elif "offsets" in column:  # starts
        texts = np.split(ids, column["offsets"].cpu()[1:])
    elif "attention_mask" in column:
        there = column["attention_mask"].cpu().numpy().astype(bool)
        texts = [row[keep] for row, keep in zip(ids, there, strict=True)]
    else:
        texts = list(ids)
    return [text.tobytes() for text in texts]


def _softmaxes(given: str | Sequence[Iterable[Direction | str]]) -> tuple[Softmax, ...]:
    if isinstance(given, str):
        if given not in SOFTMAXES:
            raise ValueError(
                f"softmaxes: got {given!r}, wanted of {list(SOFTMAXES)}, or sets of "
                f"{[member.value for member in Direction]}"
            )
        return SOFTMAXES[given]
    named: dict[Any, Any] = {member.value: member for member in Direction}
    softmaxes = tuple(frozenset(named.get(name, name) for name in softmax) for softmax in given)
    check_softmaxes(softmaxes)
    return softmaxes


def _plain_softmaxes(softmaxes: tuple[Softmax, ...]) -> Any:
    """Their name, or the names of directions where they have none."""
    for name, known in SOFTMAXES.items():
        if softmaxes == known:
            return name
    return [sorted(direction.value for direction in softmax) for softmax in softmaxes]


def _false_negatives(given: FalseNegatives | Mapping[str, Any] | None) -> FalseNegatives | None:
    value = _value(FalseNegatives, given, "false_negatives")
    if value is not None and (value.guided or isinstance(value.margin, Tensor)):
        raise ValueError(
            "false_negatives: got tensors, which belong to one batch, wanted a margin that is a "
            "number and no guides"
        )
    return value


def _hardness(given: Hardness | Mapping[str, Any] | None) -> Hardness | None:
    value = _value(Hardness, given, "hardness")
    return value and replace(value, on=_member(Negatives, value.on, "hardness.on"))


def _value(kind: type[Value], given: Value | Mapping[str, Any] | None, name: str) -> Value | None:
    """Options as they are, or from their fields."""
    if given is None or isinstance(given, kind):
        return given
    try:
        return kind(**given)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(
            f"{name}: got {given!r}, wanted {kind.__name__}(...) or its fields ({error})"
        ) from None


def _member(kind: Any, given: Any, name: str) -> Any:
    """One of an enumeration, by itself or by its value."""
    try:
        return kind(given)
    except ValueError:
        values = [member.value for member in kind]
        raise ValueError(f"{name}: got {given!r}, wanted of {values}") from None


def _bibtex(key: str, title: str, authors: str, year: int, arxiv: str) -> str:
    return (
        f"@misc{{{key},\n  title = {{{title}}},\n  author = {{{authors}}},\n  year = {{{year}}},\n"
        f"  eprint = {{{arxiv}}},\n  archivePrefix = {{arXiv}},\n}}"
    )


_CPC = _bibtex(
    "oord2018cpc",
    "Representation Learning with Contrastive Predictive Coding",
    "van den Oord, Aaron and Li, Yazhe and Vinyals, Oriol",
    2018,
    "1807.03748",
)
_GRADCACHE = _bibtex(
    "gao2021gradcache",
    "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
    "Gao, Luyu and Zhang, Yunyi and Han, Jiawei and Callan, Jamie",
    2021,
    "2101.06983",
)
_PAPERS = {
    "symmetric": _bibtex(
        "radford2021clip",
        "Learning Transferable Visual Models From Natural Language Supervision",
        "Radford, Alec and others",
        2021,
        "2103.00020",
    ),
    "gte": _bibtex(
        "li2023gte",
        "Towards General Text Embeddings with Multi-stage Contrastive Learning",
        "Li, Zehan and others",
        2023,
        "2308.03281",
    ),
    "qwen3": _bibtex(
        "zhang2025qwen3",
        "Qwen3 Embedding: Advancing Text Embedding and Reranking Through Foundation Models",
        "Zhang, Yanzhao and others",
        2025,
        "2506.05176",
    ),
}
