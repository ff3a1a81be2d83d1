"""Batches for the loss on a GPU: sets of options, each option in at least one of them.

Embeddings and guides lie on a grid on which similarities are exact in float32, and bounds of false
negatives lie between its points: who is hidden does not depend on rounding, at any size.

Shape suffixes: M queries, N documents, C bank documents, P positives, D and G embedding sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lowmem_cft_kernels import (
    GTE,
    ONE_WAY,
    QWEN3,
    SYMMETRIC,
    Bank,
    Candidates,
    Direction,
    FalseNegatives,
    Hardness,
    InfoNCEResult,
    LossOptions,
    LossPath,
    Negatives,
    info_nce,
)
from lowmem_cft_kernels.masks import NO_TARGET, SHARED
from lowmem_cft_kernels.reference import reference_loss

Shape = tuple[int, int, int]
"""M, N, D."""

SOFTMAXES = {
    "symmetric": SYMMETRIC,
    "gte": GTE,
    "qwen3": QWEN3,
    "queries": (frozenset({Direction.DOC_TO_QUERY, Direction.QUERY_TO_QUERY}),),
}
HARDNESS = {"hard": Negatives.HARD, "in-batch": Negatives.IN_BATCH, "all": Negatives.ALL}
MARGINS = {"margin", "relative", "row-margins"}

OPTION_SETS: dict[str, frozenset[str]] = {
    text or "plain": frozenset(text.split())
    for text in (
        "",
        "symmetric keys weights",
        "gte positives ignored",
        "qwen3 shared key margin",
        "own hard weights",
        "symmetric own relative",
        "shared in-batch row-margins bank key",
        "guides normalize bank margin",
        "qwen3 guides positives normalize relative",
        "queries margin ignored",
        "all bank weights tensor",
        "symmetric normalize keys tensor",
        "symmetric own keys weights row-margins ignored strided",
        "gte positives ignored keys own guides row-margins in-batch weights bank normalize",
    )
}
"""Softmaxes (one way if none is named), several positives, rows left out, owners, one key or two
per query, bounds, hardness and so on; strided: vectors that lie among other numbers, as columns of
a matrix do; see `make_case`."""

_GUIDE_WIDTH = 16
_TEMPERATURE = 0.125
_NOISE = 2.0**-9


@dataclass(frozen=True)
class Case:
    """What `info_nce` is called with; `options` are its keywords.

    `strided`: `to` lays all vectors out with gaps.
    """

    query_MD: Tensor
    doc_ND: Tensor
    candidates: Candidates
    options: Mapping[str, Any]
    strided: bool = False

    def run(self, path: LossPath, **more: Any) -> InfoNCEResult:
        return info_nce(
            self.query_MD, self.doc_ND, self.candidates, path=path, **self.options, **more
        )

    def to(self, dtype: torch.dtype, device: torch.device) -> Case:
        """On a device, embeddings and guides in a dtype; nothing is rounded."""

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(
                device, dtype if value.ndim == 2 and value.is_floating_point() else None
            )

        options = dict(self.options)
        for name, value in options.items():
            if isinstance(value, (Bank, FalseNegatives)):
                value = replace(value, **{key: moved(part) for key, part in vars(value).items()})
            options[name] = moved(value)
        candidates = self.candidates.to(device)
        if self.strided:
            options = {name: with_gaps(value) for name, value in options.items()}
            candidates = with_gaps(candidates)
        query_MD, doc_ND = moved(self.query_MD), moved(self.doc_ND)
        return replace(
            self, query_MD=query_MD, doc_ND=doc_ND, candidates=candidates, options=options
        )

    def off_the_grid(self) -> Case:
        """Embeddings that 16 bits cannot hold, but float32 can; only for sets without bounds."""
        draw = torch.Generator().manual_seed(8)

        def moved(x_RD: Tensor) -> Tensor:
            noise_RD = torch.randn(x_RD.shape, generator=draw, dtype=torch.float64).to(x_RD.device)
            return (x_RD * (1 + _NOISE * noise_RD)).float().to(x_RD.dtype)

        return replace(self, query_MD=moved(self.query_MD), doc_ND=moved(self.doc_ND))

    def by_eager(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, documents and temperature by autograd in the inputs' own dtype."""
        temperature = torch.as_tensor(self.options["temperature"], device=self.query_MD.device)
        leaves = [x.clone().requires_grad_() for x in (self.query_MD, self.doc_ND, temperature)]
        options = LossOptions(**{**self.options, "temperature": leaves[2]})
        loss, _ = reference_loss(leaves[0], leaves[1], self.candidates, options)
        return torch.autograd.grad(loss, leaves)  # type: ignore[return-value]


def with_gaps(value: Any) -> Any:
    """The same, in which every vector and every matrix of integers is a column of something wider.

    Between its numbers lie those of another place: whoever takes them for contiguous reads numbers
    that could be right.
    """
    if isinstance(value, (Candidates, FalseNegatives, Bank)):
        given = [field.name for field in fields(value) if field.init]
        return replace(value, **{name: with_gaps(getattr(value, name)) for name in given})
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.ndim == 2 and value.is_floating_point():
        return value
    return torch.stack([value, value.flip(0)], dim=-1)[..., 0]


def make_case(words: frozenset[str], shape: Shape) -> Case:
    """In float64 on the CPU; half of the queries are near their positive."""
    num_queries, num_docs, width = shape
    draw = torch.Generator().manual_seed(7)
    normalize = "normalize" in words

    def integers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=draw)

    def embeddings(rows: int) -> Tensor:
        return integers(-3, 4, rows, width).double()

    unit = 2.0 ** -round(math.log2(2 * math.sqrt(width)))
    target_MP = torch.rand(num_queries, num_docs, generator=draw).topk(3, dim=1).indices
    doc_ND, query_MD = embeddings(num_docs), embeddings(num_queries)
    query_MD[::2] += doc_ND[target_MP[::2, 0]]
    doc_guide_NG = (2 * integers(0, 2, num_docs, _GUIDE_WIDTH) - 1).double()
    query_guide_MG = (2 * integers(0, 2, num_queries, _GUIDE_WIDTH) - 1).double()
    query_guide_MG[::2, 4:] = doc_guide_NG[target_MP[::2, 0], 4:]
    if "positives" in words:
        target_MP[:, 1].masked_fill_(integers(0, 3, num_queries) == 0, NO_TARGET)
    else:
        target_MP = target_MP[:, :1]
    if "ignored" in words:
        target_MP[1::3] = NO_TARGET
    bank = None
    if "bank" in words:
        bank = _bank(words, unit * embeddings(4 + num_docs // 3), doc_guide_NG, draw)
    guides = {"query_guide_MG": query_guide_MG, "doc_guide_NG": doc_guide_NG}
    false_negatives = _false_negatives(words, unit, guides, draw)
    if normalize:  # by powers of two: still on a grid
        query_MD *= 2.0 ** integers(-1, 2, num_queries, 1)
        doc_ND *= 2.0 ** integers(-1, 2, num_docs, 1)
    weight_M = 0.1 + torch.rand(num_queries, generator=draw)
    weight_M[1::4] = 0
    hardness = next((HARDNESS[word] for word in words & HARDNESS.keys()), None)
    options = {
        "temperature": torch.tensor(_TEMPERATURE) if "tensor" in words else _TEMPERATURE,
        "softmaxes": next((SOFTMAXES[word] for word in words & SOFTMAXES.keys()), ONE_WAY),
        "false_negatives": false_negatives,
        "hardness": None if hardness is None else Hardness(strength=3.0, on=hardness),
        "weight_M": weight_M if "weights" in words else None,
        "bank": bank,
        "normalize": normalize,
    }
    candidates = _candidates(words, target_MP, num_docs, draw)
    strided = "strided" in words
    return Case(unit * query_MD, unit * doc_ND, candidates, options, strided)


def _bank(
    words: frozenset[str], doc_CD: Tensor, doc_guide_NG: Tensor, draw: torch.Generator
) -> Bank:
    size, num_docs = len(doc_CD), len(doc_guide_NG)
    keyed = words & {"key", "keys"}
    return Bank(
        doc_CD=doc_CD,
        keys_C=torch.randint(0, num_docs, (size,), generator=draw) if keyed else None,
        guide_CG=doc_guide_NG[:size] if "guides" in words else None,
    )


def _false_negatives(
    words: frozenset[str], unit: float, guides: dict[str, Tensor], draw: torch.Generator
) -> FalseNegatives | None:
    if not words & (MARGINS | {"guides"}):
        return None
    guided = "guides" in words
    return FalseNegatives(
        margin=_margin(words, 1 / 8 if guided else unit**2, draw, len(guides["query_guide_MG"])),
        relative="relative" in words,
        **(guides if guided else {}),
    )


def _margin(
    words: frozenset[str], step: float, draw: torch.Generator, num_queries: int
) -> float | Tensor:
    """Half a step off the grid, so that no similarity is at a bound."""
    if "relative" in words:
        return 0.25
    steps = round(0.1 / step)
    if "row-margins" in words:
        return -step * (torch.randint(0, 2 * steps + 1, (num_queries,), generator=draw) + 0.5)
    return -step * (steps + 0.5)


def _candidates(
    words: frozenset[str], target_MP: Tensor, num_docs: int, draw: torch.Generator
) -> Candidates:
    given: dict[str, Any] = {"target": target_MP if "positives" in words else target_MP[:, 0]}
    if words & {"own", "shared"}:
        owner_N = torch.randint(0, len(target_MP), (num_docs,), generator=draw)
        shared_N = torch.rand(num_docs, generator=draw) < 0.4
        given["owner_N"] = owner_N.masked_fill(shared_N, SHARED)
        given["own_only"] = "own" in words
    if words & {"key", "keys"}:
        doc_key_N = torch.randint(0, 1 + num_docs // 3, (num_docs,), generator=draw)
        key_M = doc_key_N[target_MP.amax(dim=1).clamp(min=0)]
        other_M = torch.randint(0, num_docs, (len(target_MP),), generator=draw)
        both = torch.stack([key_M, other_M], dim=1)
        given |= {"doc_keys": doc_key_N, "query_keys": both if "keys" in words else key_M}
    return Candidates(**given)
