"""One training step on a logical batch: its texts through the encoder, the loss and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lowmem_cft.batches import StepTexts
from lowmem_cft.embedding_cache import Slots
from lowmem_cft.encoder import Encoder
from lowmem_cft.gradcache import gradcache_step
from lowmem_cft.plan import StepPlan
from lowmem_cft.recipe import LossSection
from lowmem_cft.tokens import TokenStore, cut_by_length, pad
from lowmem_cft_kernels import ONE_WAY, SYMMETRIC, info_nce


@dataclass(frozen=True)
class StepReport:
    """What a step found, and how it went.

    `loss` and `accuracy` are scalars, as in `InfoNCEResult`. `plan` is the one for the next step: smaller than the one given where memory ran out.
    `tokens` are real ones, `padded_tokens` what they became in the chunks that made the gradient.
    """

    loss: Tensor
    accuracy: Tensor
    plan: StepPlan
    texts: int
    tokens: int
    padded_tokens: int

    @property
    def padding_share(self) -> float:
        """Padding tokens over real ones."""
        return self.padded_tokens / self.tokens - 1


@dataclass(frozen=True)
class ContrastiveStep:
    """Computes loss and gradient of steps.

    Args:
        encoder: in its training mode when called.
        store: token ids of all texts.
        pad_id: the tokenizer's padding token.
        loss: the recipe's.
        parameters: the adapter's.
        chunk_cost: see `tokens.chunk_by_tokens`.
    """

    encoder: Encoder
    store: TokenStore
    pad_id: int
    loss: LossSection
    parameters: Sequence[nn.Parameter]
    chunk_cost: int

    def __call__(
        self, texts: StepTexts, plan: StepPlan, *, gradient_scale: float = 1.0
    ) -> StepReport:
        """Add the gradient of the step to `.grad`; see `gradcache_step` for what it raises."""
        lengths_P = self.store.lengths[texts.text_P]
        padded = 0

        def encode(place_B: Tensor) -> Tensor:
            nonlocal padded
            batch = pad(self.store, texts.text_P[place_B.numpy()], self.pad_id)
            padded += batch.ids_BT.numel() if torch.is_grad_enabled() else 0
            return self.encoder(batch, place_B)

        (loss, accuracy), plan = gradcache_step(
            encode,
            partial(_info_nce, texts, self.loss),
            cut=partial(cut_by_length, lengths_P, chunk_cost=self.chunk_cost),
            slots=Slots(texts.place_S),
            parameters=self.parameters,
            plan=plan,
            gradient_scale=gradient_scale,
        )
        return StepReport(loss, accuracy, plan, len(lengths_P), int(lengths_P.sum()), padded)


def _info_nce(
    texts: StepTexts, section: LossSection, emb_SD: Tensor, d_emb_SD: Tensor, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of the step's slots; the rest is a `gradcache.Loss`."""
    query, doc = slice(0, texts.num_queries), slice(texts.num_queries, None)
    result = info_nce(
        emb_SD[query],
        emb_SD[doc],
        texts.candidates.to(emb_SD.device),
        temperature=section.temperature,
        softmaxes=SYMMETRIC if section.symmetric else ONE_WAY,
        workspace_bytes=workspace_bytes,
        out=(d_emb_SD[query], d_emb_SD[doc]),
    )
    return result.loss, result.accuracy
