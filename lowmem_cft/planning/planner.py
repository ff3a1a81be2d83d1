"""Predicts a step's peak memory and cost, and chooses the fastest plan that fits.

All terms are bytes of parts that are alive together; the step has four moments that can be its
peak, and the prediction is the highest of them:

    embedding      embeddings + kept graphs + a chunk's forward
    loss           embeddings + their gradient + kept graphs + the loss's workspace
    kept backward  gradient of embeddings + kept graphs + the backward of one of them
    backward       gradient of embeddings + a chunk's forward and backward

Costs are in forward passes of one token. The plain step costs 1 + b per padded token, b the
backward; a chunk that is encoded again adds 1, a checkpointed layer its share of 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lowmem_cft.data.chunks import chunk_by_tokens
from lowmem_cft.gradient.plan import MIN_WORKSPACE_BYTES, StepPlan, auto_embedding_dtype
from lowmem_cft.machine import compute_capability
from lowmem_cft.model.attention import TILE
from lowmem_cft.planning.footprint import Footprint
from lowmem_cft.planning.limits import MARGINS
from lowmem_cft.planning.tracing import ChunkCost
from lowmem_cft.recipe.schema import LossSection, MemorySection
from lowmem_cft.units import GIB
from lowmem_cft_kernels import split_bytes

SLACK = 0.05
"""Share of what a step allocates that is lost between the allocator's blocks."""

BEST_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Beyond this a larger chunk is not faster: 2 CPU cores are busy and their cache is full; a GPU
has enough rows for its matrix units."""

CHUNK_COST = {"cpu": 32, "cuda": 512}
"""Fixed time of a chunk (launches, de-quantisation) in tokens' worth of one pass."""

INDEX_BYTES = 96
"""Per slot: places, keys and owners as int64, and the temporaries of gathering them."""

LOSS_WORKSPACES = {"cpu": (), "cuda": (2**29, 2**28, 2**27, 2**26)}
"""What the loss is given beyond its usual workspace where there is room, the best first: on a GPU
its products are twice as fast on thousands of rows as on hundreds (docs/log.md). Two CPU cores work
best on what their cache holds."""

LEAST_GAIN = 0.005
"""Of the plain step's cost: for less no graphs are kept, since they would fill all memory."""

_EVERY = (0, 4, 2, 1)
_SHORTEST = 4
"""Tokens of the shortest texts, where lengths are unknown."""
_EMBEDDING_BYTES = {"fp32": 4, "split-bf16": 4, "bf16": 2, "fp16": 2}
_SAMPLE = 4096


@dataclass(frozen=True)
class Chunking:
    """How a step is cut.

    Attributes:
        padded_tokens: of all chunks.
        num_chunks: a mean, where the step was estimated from a sample.
        shapes: (texts, padded tokens of each) of those chunks one of which needs most memory,
            whether it goes by tokens or by texts.
    """

    padded_tokens: int
    num_chunks: float
    shapes: tuple[tuple[int, int], ...]

    @property
    def largest(self) -> int:
        """Padded tokens of the largest chunk."""
        return max(num_texts * width for num_texts, width in self.shapes)


@dataclass(frozen=True, eq=False)  # so that `cut` can be remembered by shape
class BatchShape:
    """What the planner has to know of a step.

    `rows`: the logical batch. `slots_per_row`: its anchor, positive and hard negatives.
    `longest`: tokens of the longest text. `lengths`: token counts of texts in random order, a step's
    or more, or None, which takes every text for as long as the longest.
    """

    rows: int
    slots_per_row: float
    longest: int
    lengths: npt.NDArray[np.int64] | None = None

    @property
    def slots(self) -> int:
        return math.ceil(self.rows * self.slots_per_row)

    @property
    def tokens(self) -> int:
        """Real tokens of a step."""
        mean = self.longest if self.lengths is None else float(self.lengths.mean())
        return round(self.slots * mean)

    @lru_cache(maxsize=64)  # noqa: B019 (shapes are few and live as long as the program)
    def cut(self, budget: int, chunk_cost: int) -> Chunking:
        """How a step is cut at a token budget."""
        if self.lengths is None:
            per_chunk = max(1, min(self.slots, budget // self.longest))
            tokens = self.slots * self.longest
            # as many texts may come together as are short
            short = min(_SHORTEST, self.longest)
            shapes = {
                (per_chunk, self.longest),
                (max(1, min(self.slots, budget // short)), short),
            }
            return Chunking(tokens, self.slots / per_chunk, _largest_shapes(shapes))
        sample = self.lengths[: min(self.slots, _SAMPLE)]
        chunks = chunk_by_tokens(sample, budget, chunk_cost)
        cut = [(len(chunk), int(sample[chunk].max())) for chunk in chunks]
        padded = sum(num_texts * width for num_texts, width in cut)
        times = self.slots / len(sample)
        shapes = set(cut)
        if times > 1:  # where the sample has too few texts of a length, the step fills a chunk
            for width in np.unique(sample).tolist():
                num_texts = math.ceil(times * int((sample <= width).sum()))
                shapes.add((max(1, min(num_texts, budget // width)), width))
        return Chunking(round(padded * times), len(chunks) * times, _largest_shapes(shapes))


def _largest_shapes(shapes: set[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Those that no other one exceeds in all that memory goes by.

    It goes by tokens, by tokens times width where weights of attention are held, and by texts,
    whose positions a GPU pads to tiles.
    """
    sizes = {
        (n, width): (n * width, n * width * width, n * math.ceil(width / TILE))
        for n, width in shapes
    }
    return tuple(
        shape
        for shape, size in sizes.items()
        if not any(
            other != size and all(a >= b for a, b in zip(other, size, strict=True))
            for other in sizes.values()
        )
    )


@dataclass(frozen=True)
class Prediction:
    """Of a step under a plan.

    `parts`: bytes of each part at the moment of the peak; their sum is `peak_bytes`.
    `moment`: which moment that is. `relative_cost`: time over that of the plain step.
    """

    plan: StepPlan
    parts: dict[str, int]
    moment: str
    relative_cost: float
    tokens: int
    padded_tokens: int
    flops: float

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "peak_bytes": {**self.parts, "total": self.peak_bytes},
            "moment": self.moment,
            "plan": self.plan.to_json(),
            "relative_cost": self.relative_cost,
            "tokens_per_step": self.tokens,
            "padded_tokens_per_step": self.padded_tokens,
            "flops_per_step": self.flops,
        }


class Planner:
    """Plans steps of one model on one kind of device.

    Args:
        footprint: of the recipe's model.
    """

    def __init__(self, footprint: Footprint) -> None:
        self.footprint = footprint
        self.device_type = footprint.device_type if footprint.device_type in MARGINS else "cpu"
        self.chunk_cost = CHUNK_COST[self.device_type]

    # -- prediction -----------------------------------------------------------------------------

    def fixed_parts(self) -> dict[str, int]:
        """Bytes that every step of the recipe holds."""
        weights = self.footprint.weights
        return {
            "weights_4bit": weights.quantized_bytes,
            "weights": weights.plain_bytes,
            "adapter": self.footprint.adapter_bytes,
            "gradients": self.footprint.adapter_bytes,
            "optimizer": self.footprint.optimizer_bytes,
            "context": MARGINS[self.device_type],
        }

    def chunk(self, tokens: int, every: int) -> ChunkCost:
        """Cost of a chunk of so many tokens in texts of the greatest length."""
        width = min(self.footprint.longest, tokens)
        return self._chunk(tokens / width, width, every)

    def dearest(self, cut: Chunking, every: int) -> ChunkCost:
        """The greatest of each cost among a step's chunks."""
        costs = [astuple(self._chunk(*shape, every)) for shape in cut.shapes]
        return ChunkCost(*(max(values) for values in zip(*costs, strict=True)))

    def _chunk(self, num_texts: float, width: int, every: int) -> ChunkCost:
        cost = self._mixed(num_texts, width, every)
        dequantized = self.footprint.weights.dequantized_bytes
        return replace(
            cost,
            forward_bytes=cost.forward_bytes + dequantized,
            keep_bytes=cost.keep_bytes + dequantized,
            backward_bytes=cost.backward_bytes + dequantized,
        )

    def _mixed(self, num_texts: float, width: int, every: int) -> ChunkCost:
        """Cost with every k-th layer checkpointed, from those with none and with all."""
        none = self.footprint.chunk_costs("none")
        if not every:
            return none(num_texts, width)
        whole = self.footprint.chunk_costs("all")
        if every == 1:
            return whole(num_texts, width)
        depth = self.footprint.num_layers
        layer = none.per_layer(num_texts, width)
        saved = layer - whole.per_layer(num_texts, width)
        plain, all_ = none(num_texts, width), whole(num_texts, width)
        checkpointed, above = divmod(depth, every)  # and layers above the topmost of them
        # From the side whose last layer is as this one's: it is lighter than the others.
        start, steps = (plain, -checkpointed) if above else (all_, depth - checkpointed)
        graph = start.graph_bytes + steps * saved
        # While one layer goes backward its own graph is there, whichever kind of layer it is; what
        # is above it is gone when its turn comes.
        full_rise = all_.backward_bytes - all_.graph_bytes
        rises = [plain.backward_bytes - plain.graph_bytes]
        if above:
            rises.append(full_rise - (above - 1) * layer if checkpointed else 0.0)
        else:
            last_saved = plain.graph_bytes - all_.graph_bytes - (depth - 1) * saved
            rises += [full_rise - (every - 1) * layer, rises[0] + layer + min(0.0, last_saved)]
        return replace(
            plain,
            graph_bytes=graph,
            keep_bytes=start.keep_bytes + steps * saved,
            backward_bytes=graph + max(rises),
        )

    def predict(self, plan: StepPlan, shape: BatchShape) -> Prediction:
        """Peak and cost of a step."""
        cut = shape.cut(plan.backward_tokens, self.chunk_cost)
        padded, chunks = cut.padded_tokens, cut.num_chunks
        kept = padded if plan.kept_tokens is None else min(plan.kept_tokens, padded)
        chunk = self.dearest(cut, plan.checkpoint_every)
        bare = self.dearest(shape.cut(plan.forward_tokens, self.chunk_cost), 0)
        num_kept = chunks * kept / padded
        graphs = _kept_bytes(self, plan, kept, num_kept)
        moments = self._moments(plan, shape, chunk, bare, graphs, all_kept=kept == padded)
        moment = max(moments, key=lambda name: sum(moments[name].values()))
        parts = self.fixed_parts() | {name: round(size) for name, size in moments[moment].items()}
        parts["slack"] = round(SLACK * sum(moments[moment].values()))
        share = _share(plan.checkpoint_every, self.footprint.num_layers)
        plain = self.chunk(cut.largest, 0)
        ratio = plain.backward_flops / plain.forward_flops
        again = padded - kept
        passes = padded * (1 + ratio + share) + again
        passes += self.chunk_cost * (chunks * (2 + share) + (chunks - num_kept))
        per_token = plain.forward_flops / cut.largest
        return Prediction(
            plan=plan,
            parts=parts,
            moment=moment,
            relative_cost=passes / (padded * (1 + ratio)),
            tokens=shape.tokens,
            padded_tokens=padded,
            flops=per_token * (padded * (1 + ratio + share) + again),
        )

    def _moments(
        self,
        plan: StepPlan,
        shape: BatchShape,
        chunk: ChunkCost,
        bare: ChunkCost,
        graphs: float,
        *,
        all_kept: bool,
    ) -> dict[str, dict[str, float]]:
        slots, dim = shape.slots, self.footprint.dim
        embeddings = slots * dim * _EMBEDDING_BYTES[plan.embedding_dtype]
        gradient = slots * dim * 4
        index = slots * INDEX_BYTES
        workspace = min(plan.workspace_bytes, _loss_bytes(shape, dim, self.footprint.recipe.loss))
        if plan.embedding_dtype == "split-bf16" and self.device_type != "cpu":
            workspace += split_bytes(slots, dim)
        host = plan.offload_embeddings and self.device_type != "cpu"
        before: dict[str, float] = {"index": index, "embeddings": 0 if host else embeddings}
        after: dict[str, float] = {"index": index, "embedding_gradient": 0 if host else gradient}
        found = self.footprint.adapter_bytes
        moments: dict[str, dict[str, float]] = {
            "loss": {
                "index": index,
                "embeddings": embeddings,
                "embedding_gradient": gradient,
                "kept_graphs": graphs,
                "loss_workspace": workspace,
            },
        }
        if not all_kept:
            moments["embedding"] = before | {"activations": bare.forward_bytes}
            moments["backward"] = after | {"activations": chunk.backward_bytes}
        if graphs:
            others = max(0.0, graphs - chunk.graph_bytes)
            moments["embedding kept"] = before | {
                "kept_graphs": others,
                "activations": chunk.keep_bytes,
            }
            moments["backward of kept"] = after | {
                "kept_graphs": others,
                "activations": max(chunk.backward_bytes, chunk.graph_bytes + found),
            }
        return moments

    # -- choice ---------------------------------------------------------------------------------

    def choose(self, section: MemorySection, shape: BatchShape, limit_bytes: int) -> Prediction:
        """The plan with the least predicted cost that fits the limit.

        Args:
            section: what the recipe leaves open, or fixes.
            limit_bytes: for everything, weights and margins included.

        Raises:
            ValueError: nothing fits; the message says what would help.
        """
        best: Prediction | None = None
        for plan in self._candidates(section, shape):
            found = self._with_kept(plan, section, shape, limit_bytes)
            if found is not None and (best is None or found.relative_cost < best.relative_cost):
                best = found
            if best is not None and best.plan.kept_tokens is None and not plan.checkpoint_every:
                break  # the largest chunks, all kept, nothing twice: nothing costs less
        if best is None:
            raise ValueError(self._advice(section, shape, limit_bytes))
        return self._with_workspace(best, shape, limit_bytes)

    def _with_workspace(self, best: Prediction, shape: BatchShape, limit_bytes: int) -> Prediction:
        """The plan with the largest workspace of the loss that fits."""
        for workspace_bytes in LOSS_WORKSPACES[self.device_type]:
            found = self.predict(replace(best.plan, workspace_bytes=workspace_bytes), shape)
            if found.peak_bytes <= limit_bytes:
                return found
        return best

    def _candidates(self, section: MemorySection, shape: BatchShape) -> Iterator[StepPlan]:
        """Every open choice but the kept graphs, those that cost least first."""
        fixed = {"auto": _EVERY, "on": (1,), "off": (0,)}
        every = fixed.get(str(section.checkpointing)) or (int(section.checkpointing),)
        offload = {"auto": (False, True), "on": (True,), "off": (False,)}
        embedding_dtype = self._embedding_dtype(section)
        for offloaded in offload[section.offload_embeddings]:
            for k in every:
                for tokens in self._budgets(section, shape):
                    yield StepPlan(
                        backward_tokens=tokens,
                        forward_tokens=self._forward_tokens(tokens, k),
                        checkpoint_every=k,
                        embedding_dtype=embedding_dtype,
                        offload_embeddings=offloaded,
                    )

    def _embedding_dtype(self, section: MemorySection) -> str:
        if section.embedding_dtype != "auto":
            return section.embedding_dtype
        return auto_embedding_dtype(
            compute_capability(self.device_type),
            normalized=self.footprint.recipe.embedding.normalize,
        )

    def _forward_tokens(self, backward_tokens: int, every: int) -> int:
        """The best budget without a graph that takes no more memory than a chunk with one."""
        room = self.chunk(backward_tokens, every).backward_bytes
        tokens = backward_tokens
        while 2 * tokens <= BEST_TOKENS[self.device_type]:
            if self.chunk(2 * tokens, 0).forward_bytes > room:
                break
            tokens *= 2
        return tokens

    def _budgets(self, section: MemorySection, shape: BatchShape) -> list[int]:
        """Token budgets to try: halves of the best one, down to one text of the greatest length."""
        if section.token_budget != "auto":
            return [section.token_budget]
        tokens = max(BEST_TOKENS[self.device_type], shape.longest)
        budgets = [tokens]
        while tokens // 2 > shape.longest:
            tokens //= 2
            budgets.append(tokens)
        return [*budgets, shape.longest] if budgets[-1] != shape.longest else budgets

    def _with_kept(
        self, plan: StepPlan, section: MemorySection, shape: BatchShape, limit_bytes: int
    ) -> Prediction | None:
        """The plan with as many graphs kept as fit; None if it does not even fit without."""

        def predicted(kept: int | None) -> Prediction | None:
            found = self.predict(replace(plan, kept_tokens=kept), shape)
            return found if found.peak_bytes <= limit_bytes else None

        if section.keep_graphs != "off" and (found := predicted(None)):
            return found
        if section.keep_graphs == "on":
            return None
        without = predicted(0)
        if without is None or section.keep_graphs == "off":
            return without
        low, high = 0, without.padded_tokens  # low fits, high does not
        while high - low > max(1, plan.backward_tokens // 8):
            middle = (low + high) // 2
            low, high = (middle, high) if predicted(middle) else (low, middle)
        kept = predicted(low)
        if kept is None or without.relative_cost - kept.relative_cost < LEAST_GAIN:
            return without
        return kept

    # -- limits ---------------------------------------------------------------------------------

    def max_rows(self, section: MemorySection, shape: BatchShape, limit_bytes: int) -> int:
        """The largest logical batch that fits the limit; 0 if none does."""
        smallest = replace(shape, lengths=None)

        def fits(rows: int) -> bool:
            some = replace(smallest, rows=rows)
            plans = self._candidates(section, some)
            kept = None if section.keep_graphs == "on" else 0
            return any(
                self.predict(replace(plan, kept_tokens=kept), some).peak_bytes <= limit_bytes
                for plan in plans
                if section.token_budget != "auto" or plan.backward_tokens == shape.longest
            )

        if not fits(1):
            return 0
        low = 1
        while low < 2**32 and fits(2 * low):
            low *= 2
        high = 2 * low
        while high - low > max(1, low // 256):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _advice(self, section: MemorySection, shape: BatchShape, limit_bytes: int) -> str:
        """What was wanted, what there is, and every single change that would make it fit."""
        free = MemorySection(limit=section.limit)
        least = min(
            (
                self.predict(plan, shape)
                for plan in self._candidates(free, shape)
                if plan.backward_tokens == shape.longest
            ),
            key=lambda found: found.peak_bytes,
        )
        fixed = sum(self.fixed_parts().values())
        ways = []
        if least.peak_bytes <= limit_bytes:
            ways.append(
                "leave memory.token_budget, keep_graphs, checkpointing and offload_embeddings on auto"
            )
        rows = self.max_rows(free, shape, limit_bytes)
        if 1 < rows < shape.rows:
            ways.append(f"train.logical_batch up to {rows}")
        if self.footprint.recipe.model.quantization == "none":
            ways.append("model.quantization: nf4")
        if shape.longest > 32:
            ways.append("a lower text.max_tokens")
        ways.append("a smaller model, or a larger memory.limit")
        return (
            f"memory: a step on texts of up to {shape.longest} tokens and a logical batch of "
            f"{shape.rows} needs at least {least.peak_bytes / GIB:.2f} GiB ({fixed / GIB:.2f} of "
            f"it before any text), and the limit is {limit_bytes / GIB:.2f} GiB; what helps: "
            + "; ".join(ways)
        )


def _share(every: int, num_layers: int) -> float:
    """Share of layers that are checkpointed."""
    return num_layers // every / num_layers if every else 0.0


def _kept_bytes(planner: Planner, plan: StepPlan, kept: int, num_chunks: float) -> float:
    """Graphs of so many tokens in so many chunks."""
    if not kept:
        return 0.0
    one = planner.chunk(plan.backward_tokens, plan.checkpoint_every).graph_bytes
    two = planner.chunk(2 * plan.backward_tokens, plan.checkpoint_every).graph_bytes
    per_token = (two - one) / plan.backward_tokens
    per_chunk = one - per_token * plan.backward_tokens
    return per_token * kept + max(0.0, per_chunk) * num_chunks


def _loss_bytes(shape: BatchShape, dim: int, loss: LossSection) -> int:
    """At most what the loss holds with all queries worked on at once."""
    docs = max(1, shape.slots - shape.rows)
    copies = 1.5  # of the logits, with their masks
    copies += 1.5 if loss.false_negative_margin is not None else 0.0
    numbers = docs * (copies + (2.0 if loss.hardness else 1.0)) + 3 * dim  # of each query
    numbers += docs if loss.softmaxes in ("symmetric", "gte") else 0.0  # held for the second pass
    if loss.softmaxes in ("gte", "qwen3"):  # queries with queries, documents with documents
        numbers += (shape.rows + docs) * copies + 6 * dim
    return max(MIN_WORKSPACE_BYTES, round(4 * shape.rows * numbers))
