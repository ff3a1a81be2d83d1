"""How a step is computed: the dials that change its time and memory and never its result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lowmem_cft.machine import AMPERE

WORKSPACE_BYTES = 32 * 2**20
"""What the loss may hold besides inputs and gradients, where no plan says otherwise."""

MIN_WORKSPACE_BYTES = 2**20
"""Below this the loss is not split further: what is short then is not its workspace."""


def auto_embedding_dtype(capability: tuple[int, int] | None, *, normalized: bool) -> str:
    """The `embedding_dtype` that puts the loss on tensor cores and rounds least.

    Unit vectors have no use for bfloat16's range, and float16 costs an eighth of its rounding: no
    more than the loss has from probabilities in 16 bits, where bfloat16 may cost ten times that at
    low temperatures (docs/log.md).

    Args:
        capability: of the CUDA device, None for a CPU, which has no tensor cores.
        normalized: embeddings are unit vectors; of others the range is not known.
    """
    if capability is None:
        return "fp32"
    if normalized:
        return "fp16"
    return "split-bf16" if capability >= AMPERE else "fp32"


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The plan of a step. Tokens are padded tokens.

    Args:
        backward_tokens: most tokens of a chunk that is encoded with a graph.
        forward_tokens: most tokens of a chunk that is encoded without one.
        kept_tokens: chunks of up to this many tokens in all keep their graph from the first
            phase, so that the second does not encode them again; None keeps all.
        checkpoint_every: gradient checkpointing of every k-th layer; 1 is every layer, 0 none.
        embedding_dtype: how the cache holds embeddings: fp32, bf16 or fp16; their gradient is
            float32. fp32 on a float64 model is float64. split-bf16 is fp32 that the loss multiplies
            as halves in bfloat16 (`lowmem_cft_kernels.Products`).
        offload_embeddings: the cache and its gradient are in (pinned) host memory except
            while the loss is computed.
        workspace_bytes: bound on what the loss holds besides inputs and gradients.
    """

    backward_tokens: int
    forward_tokens: int
    kept_tokens: int | None = 0
    checkpoint_every: int = 0
    embedding_dtype: str = "fp32"
    offload_embeddings: bool = False
    workspace_bytes: int = WORKSPACE_BYTES

    def __post_init__(self) -> None:
        assert self.backward_tokens > 0
        assert self.forward_tokens > 0
        assert self.kept_tokens is None or self.kept_tokens >= 0
        assert self.checkpoint_every >= 0

    def keeps(self, tokens: int) -> bool:
        """Whether `tokens` tokens of kept graphs are within the plan."""
        return self.kept_tokens is None or tokens <= self.kept_tokens

    def describe(self) -> str:
        """The plan in one line of English."""
        chunks = f"chunks of up to {self.backward_tokens} tokens, padding counted"
        if self.kept_tokens is not None and self.forward_tokens != self.backward_tokens:
            chunks += f" ({self.forward_tokens} where only vectors are wanted)"
        graph = "what the backward pass needs"
        if self.kept_tokens is None:
            graphs = f"all graphs kept ({graph}), so that each text is encoded once"
        elif self.kept_tokens == 0:
            graphs = f"no graph kept ({graph}), so that each text is encoded twice"
        else:
            graphs = (
                f"graphs of {self.kept_tokens} tokens kept ({graph}), so that the other texts are "
                "encoded twice"
            )
        parts = [chunks, graphs]
        if self.checkpoint_every:
            which = {1: "all layers", 2: "every 2nd layer", 3: "every 3rd layer"}.get(
                self.checkpoint_every, f"every {self.checkpoint_every}th layer"
            )
            parts.append(f"{which} checkpointed (computed again in the backward pass)")
        if self.offload_embeddings:
            parts.append("embeddings in host memory")
        if self.embedding_dtype != "fp32":
            parts.append(f"embeddings in {self.embedding_dtype}")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
