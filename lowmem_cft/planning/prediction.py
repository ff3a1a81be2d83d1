"""Predicts what a step takes under a plan: its peak memory and its cost.

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
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lowmem_cft.data.chunks import chunk_by_tokens
from lowmem_cft.gradient.plan import MIN_WORKSPACE_BYTES, StepPlan
from lowmem_cft.gradient.step import loss_options
from lowmem_cft.model.attention import TILE
from lowmem_cft.planning.footprint import Footprint
from lowmem_cft.planning.limits import MARGINS
from lowmem_cft.planning.tracing import ChunkCost
from lowmem_cft_kernels import LossOptions, LossPath, Products, workspace_bytes

SLACK = 0.05
"""Share of what a step allocates that is lost between the allocator's blocks."""

CHUNK_COST = {"cpu": 32, "cuda": 512}
"""Fixed time of a chunk (launches, de-quantisation), in tokens that a forward takes as long for."""

INDEX_BYTES = 96
"""Bytes per slot of places, keys and owners as int64, and of the temporaries of gathering them."""

_SHORTEST = 4  # tokens of the shortest texts, where lengths are unknown
_SAMPLE = 4096  # texts that stand for a step's
_EMBEDDING_DTYPES = {
    "fp32": torch.float32,
    "split-bf16": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Chunking:
    """How a step is cut into chunks.

    Attributes:
        padded_tokens: tokens of all chunks, padding included.
        num_chunks: the number of chunks, a mean where the step was estimated from a sample.
        shapes: (texts, padded tokens of each) of the chunks that may need most memory, whether
            that goes by tokens or by texts.
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

    Attributes:
        rows: the logical batch.
        slots_per_row: texts of a row: its anchor, its positive and its hard negatives.
        longest: tokens of the longest text.
        lengths: token counts of texts in random order, as many as a step has or more. With None
            every text is taken to be as long as the longest.
    """

    rows: int
    slots_per_row: float
    longest: int
    lengths: npt.NDArray[np.int64] | None = None

    @property
    def slots(self) -> int:
        """Texts of a step, with those that come twice."""
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
    """The shapes that no other one exceeds in all that memory goes by.

    Memory goes by tokens, by tokens times width where weights of attention are held, and by texts,
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
    """What a step takes under a plan.

    Attributes:
        parts: bytes of each part at the moment of the peak.
        moment: which moment that is.
        relative_cost: time of the step over that of the plain step.
        tokens, padded_tokens: tokens of the step, without and with padding.
        flops: floating-point operations of the step.
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
        """Most bytes held at once, the process's own included."""
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


class Predictor:
    """Predicts steps of one model on one kind of device.

    Args:
        footprint: the model's.
    """

    def __init__(self, footprint: Footprint) -> None:
        self.footprint = footprint
        self.device_type = footprint.device_type if footprint.device_type in MARGINS else "cpu"
        self.chunk_cost = CHUNK_COST[self.device_type]

    def fixed_parts(self) -> dict[str, int]:
        """Bytes that every step of the recipe holds, by part."""
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
        """Cost of a chunk of so many tokens in texts of the greatest length.

        Args:
            tokens: padded tokens of the chunk.
            every: every k-th layer is checkpointed; 0 none.
        """
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
        graphs = self._graph_bytes(plan, kept, num_kept)
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

    def _graph_bytes(self, plan: StepPlan, kept: int, num_chunks: float) -> float:
        """Bytes of the graphs of so many tokens in so many chunks."""
        if not kept:
            return 0.0
        single = self.chunk(plan.backward_tokens, plan.checkpoint_every).graph_bytes
        double = self.chunk(2 * plan.backward_tokens, plan.checkpoint_every).graph_bytes
        per_token = (double - single) / plan.backward_tokens
        per_chunk = single - per_token * plan.backward_tokens
        return per_token * kept + max(0.0, per_chunk) * num_chunks

    def _loss_bytes(self, plan: StepPlan, shape: BatchShape) -> int:
        """Bytes that the loss holds besides embeddings and their gradient, as the kernels say."""
        section, on_card = self.footprint.recipe.loss, self.device_type != "cpu"
        split = on_card and plan.embedding_dtype == "split-bf16"
        options = LossOptions(
            temperature=section.temperature,
            **loss_options(section),
            products=Products.SPLIT_BF16 if split else Products.EXACT,
            path=LossPath.TRITON if on_card else LossPath.CHUNKED,
            workspace_bytes=plan.workspace_bytes,
        )
        held = workspace_bytes(
            shape.rows,
            max(1, shape.slots - shape.rows),
            self.footprint.dim,
            options,
            dtype=_EMBEDDING_DTYPES[plan.embedding_dtype],
        )
        return max(held, min(plan.workspace_bytes, MIN_WORKSPACE_BYTES))

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
        """Bytes of the parts that are alive at each moment.

        Args:
            chunk, bare: the greatest costs of chunks with a graph and of those without.
            graphs: bytes of kept graphs.
            all_kept: no chunk is encoded without a graph.
        """
        numbers = shape.slots * self.footprint.dim
        embeddings = numbers * _EMBEDDING_DTYPES[plan.embedding_dtype].itemsize
        gradient = numbers * torch.float32.itemsize
        index = shape.slots * INDEX_BYTES
        on_host = plan.offload_embeddings and self.device_type != "cpu"
        forward: dict[str, float] = {"index": index, "embeddings": 0 if on_host else embeddings}
        backward: dict[str, float] = {
            "index": index,
            "embedding_gradient": 0 if on_host else gradient,
        }
        moments: dict[str, dict[str, float]] = {
            "loss": {
                "index": index,
                "embeddings": embeddings,
                "embedding_gradient": gradient,
                "kept_graphs": graphs,
                "loss_workspace": self._loss_bytes(plan, shape),
            },
        }
        if not all_kept:
            moments["embedding"] = forward | {"activations": bare.forward_bytes}
            moments["backward"] = backward | {"activations": chunk.backward_bytes}
        if graphs:
            others = {"kept_graphs": max(0.0, graphs - chunk.graph_bytes)}
            # gradients of the adapter come beside the graph that goes backward
            graph = chunk.graph_bytes + self.footprint.adapter_bytes
            in_backward = {"activations": max(chunk.backward_bytes, graph)}
            moments["embedding kept"] = forward | others | {"activations": chunk.keep_bytes}
            moments["backward of kept"] = backward | others | in_backward
        return moments


def _share(every: int, num_layers: int) -> float:
    """Share of layers that are checkpointed."""
    return num_layers // every / num_layers if every else 0.0
