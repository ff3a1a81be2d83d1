"""The export, tried before the training: what fails there would have failed after it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from lowmem_cft import machine
from lowmem_cft.exporting.check import MIN_COSINE, checked
from lowmem_cft.exporting.layout import Kind, write_model
from lowmem_cft.files import scratch_folder
from lowmem_cft.inference.embed import embed_texts
from lowmem_cft.inference.loading import Embedder
from lowmem_cft.model.adapter import trainable_parameters
from lowmem_cft.progress import Says

_WAY_OUT: dict[Kind, str] = {
    "adapter": "output.export: none trains without an export",
    "merged": "set output.export: adapter, or none to train without an export",
}
_PROBE = ["It is raining.", "Take an umbrella.", "The shop is closed."]


def rehearse_export(
    embedder: Embedder, target: Path, kind: Kind, observer: Says, texts: Sequence[str] = ()
) -> None:
    """Write an adapter of random weights beside `target`, check it, and forget all of it.

    An adapter that is not trained yet moves no embedding, so that an export without it would pass.

    Raises:
        ValueError: the layout cannot express the recipe, or the base model's vectors are not finite.
        RuntimeError: the export does not embed as the model.
        OSError: it cannot be written.
    """
    observer.say("trying the export before the training, on an adapter of random weights")
    with _random_adapter(embedder, kind), scratch_folder(target) as folder:
        write_model(embedder, folder, kind)
        checked(folder, kind, embedder, observer, texts, way_out=_WAY_OUT[kind])
    gc.collect()
    machine.release_freed_memory(embedder.encoder.device)


@contextmanager
def _random_adapter(embedder: Embedder, kind: Kind) -> Iterator[None]:
    """Seeded weights that move embeddings visibly, in numbers that the base's dtype has."""
    parameters = trainable_parameters(embedder.encoder.model)
    trained = [parameter.detach().clone() for parameter in parameters]
    with torch.random.fork_rng(devices=_cuda_devices(embedder)):
        torch.manual_seed(0)
        try:
            with embedder.encoder.model.disable_adapter():
                base = _probe_vectors(embedder)
            if not torch.isfinite(base).all():
                dtype = machine.dtype_name(embedder.backbone.dtype)
                raise ValueError(
                    f"model.dtype: the base model's embeddings are not finite in {dtype}; take a wider "
                    "one, such as model.dtype: fp32"
                )
            std = 0.02
            while True:
                _fill(parameters, std, embedder.backbone.dtype)
                cosine = torch.nn.functional.cosine_similarity(base, _probe_vectors(embedder))
                if (
                    not float(cosine.min()) >= MIN_COSINE[kind]
                ):  # or not finite, which the check says
                    break
                std *= 2
                assert std < 10, "an adapter of random weights moves no embedding"
            yield
        finally:
            for parameter, weights in zip(parameters, trained, strict=True):
                parameter.data.copy_(weights)


def _cuda_devices(embedder: Embedder) -> list[torch.device]:
    device = embedder.encoder.device
    return [device] if device.type == "cuda" else []


def _probe_vectors(embedder: Embedder) -> torch.Tensor:
    """float32 (texts, D)"""
    vectors = embed_texts(embedder.encoder, embedder.tokenizer, _PROBE, embedder.text_format)
    return torch.from_numpy(vectors)


def _fill(parameters: list[nn.Parameter], std: float, dtype: torch.dtype) -> None:
    for parameter in parameters:
        weights = torch.empty(parameter.shape).normal_(std=std).to(dtype)
        parameter.data.copy_(weights)
