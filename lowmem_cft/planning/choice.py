"""Chooses the fastest plan that fits a limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lowmem_cft.gradient.plan import StepPlan, auto_embedding_dtype
from lowmem_cft.machine import compute_capability
from lowmem_cft.planning.prediction import BatchShape, Prediction, Predictor
from lowmem_cft.recipe.schema import MemorySection
from lowmem_cft.units import GIB

BEST_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens beyond which a larger chunk is not faster: 2 CPU cores are busy and their cache is full; a
GPU has enough rows for its matrix units."""

LOSS_WORKSPACES = {"cpu": (), "cuda": (2**29, 2**28, 2**27, 2**26)}
"""Bytes that the loss is given beyond its usual workspace where there is room, the best first: on a
GPU its products are twice as fast on thousands of rows as on hundreds (docs/log.md). Two CPU cores
work best on what their cache holds."""

LEAST_GAIN = 0.005
"""Least gain for which graphs are kept, as a share of the plain step's cost: for less they would
fill all memory."""

_EVERY = (0, 4, 2, 1)  # every k-th layer checkpointed, the cheapest first


class Planner(Predictor):
    """Plans steps of one model on one kind of device."""

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
            fitting = self._with_kept(plan, section, shape, limit_bytes)
            if fitting and (best is None or fitting.relative_cost < best.relative_cost):
                best = fitting
            if best is not None and best.plan.kept_tokens is None and not plan.checkpoint_every:
                break  # the largest chunks, all kept, nothing twice: nothing costs less
        if best is None:
            raise ValueError(self._advice(section, shape, limit_bytes))
        return self._with_workspace(best, shape, limit_bytes)

    def _with_workspace(self, best: Prediction, shape: BatchShape, limit_bytes: int) -> Prediction:
        """The plan with the largest workspace of the loss that fits."""
        for workspace_bytes in LOSS_WORKSPACES[self.device_type]:
            larger = self.predict(replace(best.plan, workspace_bytes=workspace_bytes), shape)
            if larger.peak_bytes <= limit_bytes:
                return larger
        return best

    def _candidates(self, section: MemorySection, shape: BatchShape) -> Iterator[StepPlan]:
        """Every open choice but the kept graphs, those that cost least first."""
        free = _EVERY if self.footprint.can_checkpoint else (0,)
        fixed = {"auto": free, "on": (1,), "off": (0,)}
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

        def fitting(kept_tokens: int | None) -> Prediction | None:
            prediction = self.predict(replace(plan, kept_tokens=kept_tokens), shape)
            return prediction if prediction.peak_bytes <= limit_bytes else None

        if section.keep_graphs != "off" and (with_all := fitting(None)):
            return with_all
        if section.keep_graphs == "on":
            return None
        without = fitting(0)
        if without is None or section.keep_graphs == "off":
            return without
        low, high = 0, without.padded_tokens  # low fits, high does not
        while high - low > max(1, plan.backward_tokens // 8):
            middle = (low + high) // 2
            low, high = (middle, high) if fitting(middle) else (low, middle)
        with_some = fitting(low)
        if with_some is None or without.relative_cost - with_some.relative_cost < LEAST_GAIN:
            return without
        return with_some

    def max_rows(self, section: MemorySection, shape: BatchShape, limit_bytes: int) -> int:
        """The largest logical batch that fits the limit; 0 if none does."""
        uniform = replace(shape, lengths=None)

        def fits(rows: int) -> bool:
            batch = replace(uniform, rows=rows)
            kept = None if section.keep_graphs == "on" else 0
            return any(
                self.predict(replace(plan, kept_tokens=kept), batch).peak_bytes <= limit_bytes
                for plan in self._candidates(section, batch)
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
        """What the step needs, what there is, and every single change that would make it fit."""
        free = MemorySection(limit=section.limit)
        least = min(
            (
                self.predict(plan, shape)
                for plan in self._candidates(free, shape)
                if plan.backward_tokens == shape.longest
            ),
            key=lambda prediction: prediction.peak_bytes,
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
        if not self.footprint.weights.quantized_bytes:
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
