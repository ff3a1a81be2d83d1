"""Cases of the InfoNCE loss, every option alone and every two together, to try any path on.

A set of options is a set of the names in `SETTINGS`. What a case is made of is drawn apart for each
ingredient and in float64, so that cases of one shape and seed differ in their options alone, and
those of two dtypes in rounding alone. A `Case` can be pickled.

Shape suffixes: M queries, N documents, C bank documents, P positives, K keys, D and G widths.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
    LearnedTemperature,
    LossPath,
    Negatives,
    Softmax,
    info_nce,
)
from lowmem_cft_kernels.masks import NO_TARGET, SHARED
from numerics import vector_error

Shape = tuple[int, int, int]
"""M, N, D."""

SOFTMAXES: dict[str, tuple[Softmax, ...]] = {
    "symmetric": SYMMETRIC,
    "gte": GTE,
    "qwen3": QWEN3,
    "queries only": (frozenset({Direction.DOC_TO_QUERY, Direction.QUERY_TO_QUERY}),),
}
HARDNESS = {f"{on.value} hardness": on for on in Negatives}

SETTINGS: dict[str, str] = {
    "several positives": "positives",
    "own negatives": "owners",
    "shared negatives": "owners",
    "ignored rows": "ignored",
    **dict.fromkeys(SOFTMAXES, "softmaxes"),
    "one key": "keys",
    "two keys": "keys",
    "absolute margin": "margin",
    "relative margin": "margin",
    "margin per row": "margin",
    "guides": "guides",
    **dict.fromkeys(HARDNESS, "hardness"),
    "weights": "weights",
    "bank": "bank",
    "bank without keys": "bank",
    "normalize": "normalize",
    "tensor temperature": "temperature",
    "learned temperature": "temperature",
}
"""Settings, and the option that each is one of; the default of an option is none of them."""

_CONFLICTS = [{"queries only", "bank"}, {"queries only", "bank without keys"}]

Settings = frozenset[str]


def singles() -> dict[str, Settings]:
    """No option, each option alone."""
    return {"plain": frozenset(), **{name: frozenset({name}) for name in SETTINGS}}


def option_sets() -> dict[str, Settings]:
    """No option, each alone, every two together, and a dozen at once."""
    sets = singles()
    for pair in combinations(SETTINGS, 2):
        if SETTINGS[pair[0]] != SETTINGS[pair[1]] and set(pair) not in _CONFLICTS:
            sets[" + ".join(pair)] = frozenset(pair)
    common = {"several positives", "ignored rows", "two keys", "guides", "weights", "normalize"}
    for softmaxes, others in {
        "one way": {"own negatives", "relative margin", "all hardness", "bank"},
        "symmetric": {"own negatives", "absolute margin", "in-batch hardness", "bank"},
        "gte": {"own negatives", "margin per row", "in-batch hardness", "bank"},
        "qwen3": {"shared negatives", "relative margin", "hard hardness", "bank without keys"},
        "queries only": {"own negatives", "margin per row", "learned temperature"},
    }.items():
        sets[f"a dozen, {softmaxes}"] = frozenset(common | others | {softmaxes} & SETTINGS.keys())
    return sets


def drawn_set(seed: int) -> Settings:
    """Any number of options at once, each equally often at its default and at each setting."""
    draw, settings = Random(seed), set[str]()
    for option in sorted(set(SETTINGS.values())):
        settings.add(draw.choice(["", *(name for name, of in SETTINGS.items() if of == option)]))
    if "queries only" in settings:
        settings -= {"bank", "bank without keys"}
    return frozenset(settings - {""})


@dataclass(frozen=True)
class Case:
    """What `info_nce` is called with; `options` are its keywords."""

    query_MD: Tensor
    doc_ND: Tensor
    candidates: Candidates
    options: dict[str, Any]

    def run(self, path: LossPath | None = None, **more: Any) -> InfoNCEResult:
        """The result by that path; `more` goes over the case's own options."""
        return info_nce(
            self.query_MD, self.doc_ND, self.candidates, **{**self.options, **more}, path=path
        )

    def having(self, **options: Any) -> Case:
        """With other options."""
        return replace(self, options={**self.options, **options})

    def to(self, dtype: torch.dtype) -> Case:
        """With its embeddings, not the guides, in another dtype."""
        bank = self.options["bank"]
        if bank is not None:
            bank = replace(bank, doc_CD=bank.doc_CD.to(dtype))
        return replace(
            self.having(bank=bank), query_MD=self.query_MD.to(dtype), doc_ND=self.doc_ND.to(dtype)
        )

    @property
    def temperature(self) -> float:
        """The temperature as a number."""
        temperature = self.options["temperature"]
        return float(temperature.detach() if isinstance(temperature, Tensor) else temperature)

    def tensors(self) -> list[Tensor]:
        """Everything that exists before the call."""
        holders = [self.candidates, self.options["false_negatives"], self.options["bank"]]
        values = [
            value for holder in holders if holder is not None for value in vars(holder).values()
        ]
        values += [self.query_MD, self.doc_ND, *self.options.values()]
        return [value for value in values if isinstance(value, Tensor)]


def make_case(
    settings: Settings, shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Case:
    """A batch in which half of the queries are near their positive."""
    unknown = settings - SETTINGS.keys()
    assert not unknown, f"no such settings: {unknown}"
    num_queries, num_docs, width = shape
    normalize = "normalize" in settings
    spread = (0.3, 3.0) if normalize else (0.7, 1.3)
    num_positives = min(3, num_docs) if "several positives" in settings else 1
    ranks_MN = torch.rand(num_queries, num_docs, generator=_draw(seed, "target"))
    target_MP = ranks_MN.topk(num_positives, dim=1).indices
    doc_ND = _normal(num_docs, width, seed, "documents")
    query_MD = _normal(num_queries, width, seed, "queries")
    query_MD[::2] += 2 * doc_ND[target_MP[::2, 0]]
    if num_positives > 1:
        target_MP = _with_fillers(target_MP, seed)
    if "ignored rows" in settings:
        target_MP[1::3] = NO_TARGET
    candidates = Candidates(
        target=target_MP if num_positives > 1 else target_MP[:, 0],
        **_owners(settings, shape, seed),
        **_keys(settings, shape, target_MP, seed),
    )
    return Case(
        _scaled(query_MD, spread, seed, "query norms").to(dtype),
        _scaled(doc_ND, spread, seed, "document norms").to(dtype),
        candidates,
        {
            "temperature": _temperature(settings),
            "softmaxes": next((SOFTMAXES[s] for s in settings & SOFTMAXES.keys()), ONE_WAY),
            "false_negatives": _false_negatives(settings, shape, dtype, seed),
            "hardness": next(
                (Hardness(strength=3.0, on=HARDNESS[s]) for s in settings & HARDNESS.keys()), None
            ),
            "weight_M": _weights(num_queries, seed) if "weights" in settings else None,
            "bank": _bank(settings, shape, dtype, spread, seed),
            "normalize": normalize,
        },
    )


def _draw(seed: int, ingredient: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{ingredient} {seed}".encode()))


def _normal(rows: int, width: int, seed: int, ingredient: str) -> Tensor:
    return torch.randn(rows, width, generator=_draw(seed, ingredient), dtype=torch.float64)


def _integers(low: int, high: int, size: tuple[int, ...], seed: int, ingredient: str) -> Tensor:
    return torch.randint(low, high, size, generator=_draw(seed, ingredient))


def _scaled(x_RD: Tensor, spread: tuple[float, float], seed: int, ingredient: str) -> Tensor:
    """With norms spread between these two."""
    share_R = torch.rand(len(x_RD), generator=_draw(seed, ingredient), dtype=torch.float64)
    return F.normalize(x_RD, dim=1) * (spread[0] + (spread[1] - spread[0]) * share_R)[:, None]


def _with_fillers(target_MP: Tensor, seed: int) -> Tensor:
    """A third of the positives gone, at least one left in each row, fillers at any place."""
    gone_MP = torch.rand(target_MP.shape, generator=_draw(seed, "fillers")) < 1 / 3
    gone_MP[:, 0] = False
    order_MP = torch.rand(target_MP.shape, generator=_draw(seed, "places")).argsort(dim=1)
    return target_MP.masked_fill(gone_MP, NO_TARGET).gather(1, order_MP)


def _owners(settings: Settings, shape: Shape, seed: int) -> dict[str, Any]:
    num_queries, num_docs, _ = shape
    # without owners, there are no hard negatives to be weighted
    if not settings & {"own negatives", "shared negatives", "hard hardness", "in-batch hardness"}:
        return {}
    shared_N = torch.rand(num_docs, generator=_draw(seed, "shared")) < 0.4
    owner_N = _integers(0, num_queries, (num_docs,), seed, "owners").masked_fill(shared_N, SHARED)
    return {"owner_N": owner_N, "own_only": "own negatives" in settings}


def _keys(settings: Settings, shape: Shape, target_MP: Tensor, seed: int) -> dict[str, Any]:
    """One key: that of a positive, and the query's own for documents that choose. Two: another text's too, as a query's own; a positive has one."""
    num_queries, num_docs, _ = shape
    if not settings & {"one key", "two keys"}:
        return {}
    doc_key_N = _integers(0, 1 + num_docs // 3, (num_docs,), seed, "document keys")
    first_M = doc_key_N[target_MP.amax(dim=1).clamp(min=0)]
    if "one key" in settings:
        own_M = _integers(0, 1 + num_docs // 3, (num_queries,), seed, "own keys")
        return {"query_keys": first_M, "doc_keys": doc_key_N, "own_keys": own_M}
    second_M = _integers(0, 2 + num_docs // 2, (num_queries,), seed, "query keys")
    third_M = _integers(0, 1 + num_docs // 3, (num_queries,), seed, "positives' keys")
    return {
        "query_keys": torch.stack([first_M, second_M], dim=1),
        "doc_keys": doc_key_N,
        "positive_keys": third_M,
    }


_GUIDE_WIDTH = 5


def _false_negatives(
    settings: Settings, shape: Shape, dtype: torch.dtype, seed: int
) -> FalseNegatives | None:
    num_queries, num_docs, _ = shape
    if not settings & {"absolute margin", "relative margin", "margin per row", "guides"}:
        return None
    guides = {}
    if "guides" in settings:
        for name, length in (("query_guide_MG", num_queries), ("doc_guide_NG", num_docs)):
            guides[name] = _normal(length, _GUIDE_WIDTH, seed, name).to(dtype)
    margin: float | Tensor = 0.0
    if "absolute margin" in settings:
        margin = -0.1
    elif "relative margin" in settings:
        margin = 0.3
    elif "margin per row" in settings:
        margin = torch.rand(num_queries, generator=_draw(seed, "margins")) * 0.4 - 0.3
    return FalseNegatives(margin=margin, relative="relative margin" in settings, **guides)


def _bank(
    settings: Settings,
    shape: Shape,
    dtype: torch.dtype,
    spread: tuple[float, float],
    seed: int,
) -> Bank | None:
    _, num_docs, width = shape
    if not settings & {"bank", "bank without keys"}:
        return None
    size = 4 + num_docs // 3
    doc_CD = _scaled(_normal(size, width, seed, "bank"), spread, seed, "bank norms")
    keyed = "bank" in settings and settings & {"one key", "two keys"}
    return Bank(
        doc_CD=doc_CD.to(dtype),
        keys_C=_integers(0, 1 + num_docs // 3, (size,), seed, "bank keys") if keyed else None,
        guide_CG=_normal(size, _GUIDE_WIDTH, seed, "bank guide").to(dtype)
        if "guides" in settings
        else None,
    )


def _weights(num_queries: int, seed: int) -> Tensor:
    """A quarter of them 0."""
    zero_M = torch.rand(num_queries, generator=_draw(seed, "zero weights")) < 0.25
    zero_M[0] = False
    weight_M = 0.1 + torch.rand(num_queries, generator=_draw(seed, "weights"))
    return weight_M.masked_fill(zero_M, 0.0)


def _temperature(settings: Settings) -> float | Tensor:
    if "tensor temperature" in settings:
        return torch.tensor(0.15)
    if "learned temperature" in settings:
        return LearnedTemperature(0.12)()  # type: ignore[no-any-return]
    return 0.2


# what a result is compared by

_CANCELLED = 0.1
"""Share of its terms below which a value is rather what rounding leaves of them."""


def errors(case: Case, got: InfoNCEResult, wanted: InfoNCEResult) -> dict[str, float]:
    """Errors of the loss and its gradients, each as one vector, relative to the exact value.

    Where the wanted value is a tenth or less of the terms that it is a difference of (the positive
    and all candidates, for each query), the error is relative to that tenth.
    """
    temperature = case.temperature
    query_norm, doc_norm = 1.0, 1.0
    inverse_query, inverse_doc = 1.0, 1.0
    if case.options["normalize"]:
        inverse_query, inverse_doc = (_rms(1 / x.norm(dim=1)) for x in (case.query_MD, case.doc_ND))
    else:
        query_norm, doc_norm = (_rms(x.norm(dim=1)) for x in (case.query_MD, case.doc_ND))
    similarity, root = query_norm * doc_norm / temperature, len(case.query_MD) ** 0.5
    terms = {
        "loss": similarity,
        "d_query_MD": similarity / query_norm * inverse_query / root,
        "d_doc_ND": similarity / doc_norm * inverse_doc / root,
        "d_temperature": similarity / temperature,
    }
    relative = {}
    for name, size in terms.items():
        value = getattr(wanted, name)
        magnitude = max(float(value.norm()), _CANCELLED * size)
        relative[name] = vector_error(getattr(got, name), value, magnitude)
    return relative


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def assert_agrees(case: Case, got: InfoNCEResult, wanted: InfoNCEResult, bound: float) -> None:
    """Loss, gradients and what was observed; NaN only where NaN is wanted."""
    for name, error in errors(case, got, wanted).items():
        assert error <= bound, f"{name}: relative error {error:.3e}, wanted at most {bound:.0e}"
    for name, value in observed(wanted).items():
        seen = observed(got)[name]
        assert torch.isclose(
            torch.tensor(seen), torch.tensor(value), rtol=bound, atol=bound, equal_nan=True
        ), f"{name}: got {seen}, wanted {value}"


def observed(result: InfoNCEResult) -> Mapping[str, float]:
    """The fields of `Observed` as numbers."""
    return {name: float(value) for name, value in vars(result.observed).items()}


def assert_substantial(result: InfoNCEResult) -> None:
    """All zeros, or a loss that is saturated, would agree with anything."""
    for name in ("loss", "d_query_MD", "d_doc_ND", "d_temperature"):
        assert float(getattr(result, name).norm()) > 1e-3, name


def assert_same_bits(got: InfoNCEResult, wanted: InfoNCEResult) -> None:
    """Not one number differs; NaN equals NaN."""
    for name in ("loss", "d_query_MD", "d_doc_ND", "d_temperature"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    for name, value in observed(wanted).items():
        seen = observed(got)[name]
        assert seen == value or (math.isnan(seen) and math.isnan(value)), name
