"""What a chunk costs in memory and arithmetic: traced on the real module tree, without weights.

The model of the configuration is built with a few layers and fake tensors, which have shapes and
no data, and one chunk goes forward and backward through it. Live bytes and FLOPs are counted on
the way, so an architecture that transformers knows needs no code here. The few layers are scaled
to the model's depth: all counts are linear in it.

Shape suffixes: B texts, T padded tokens of each.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lowmem_cft.data.chunks import TokenBatch
from lowmem_cft.model import lora as lora_layers
from lowmem_cft.model.adapter import attach_adapter, set_checkpointing, trainable_parameters
from lowmem_cft.model.attention import AsOnDevice, AttentionCall, Backend, backward_bytes
from lowmem_cft.model.causality import declared_bidirectional
from lowmem_cft.model.configs import base_model_kwargs, disable_layer_dropout
from lowmem_cft.model.dropout import DropoutClock
from lowmem_cft.model.encoder import Encoder, Pooling
from lowmem_cft.planning.live_bytes import LiveBytes
from lowmem_cft.recipe.schema import LoraSection

Checkpointing = Literal["none", "all"]

_LAYERS = (2, 4)
"""Depths that are traced, in layers: at least two, as the first and the last are not like the rest."""

_TOKENS = 256
"""Least tokens of a chunk that is traced: in tiny ones the peak is not where it is in real ones."""


@dataclass(frozen=True)
class ChunkCost:
    """What one chunk takes: bytes besides weights, floating-point operations.

    Attributes:
        graph_bytes: bytes that stay alive between its forward and its backward.
        forward_bytes: most bytes alive in a forward without a graph, which is never checkpointed:
            with checkpointing it is not traced, 0.
        keep_bytes: most bytes alive in a forward with a graph.
        backward_bytes: most bytes alive in forward and backward together, adapter gradients
            included.
        forward_flops, backward_flops: operations without checkpointing; with it they are not
            traced, 0.
    """

    graph_bytes: float
    forward_bytes: float
    keep_bytes: float
    backward_bytes: float
    forward_flops: float
    backward_flops: float


def with_layers(config: Any, num_layers: int) -> Any:
    """The configuration with so many layers, what it lists for each layer repeated."""
    config = copy.deepcopy(config)
    for key, values in list(vars(config).items()):
        if isinstance(values, list) and len(values) == config.num_hidden_layers:
            setattr(config, key, [values[i % len(values)] for i in range(num_layers)])
    config.num_hidden_layers = num_layers
    return config


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The base model on the meta device: all shapes, no data."""
    from transformers import AutoModel

    # Modules that would use an optional library say at import that it is absent.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=dtype, **base_model_kwargs(config))
    disable_layer_dropout(model)
    model.requires_grad_(False)
    return model


def _give_fake_storage(model: nn.Module) -> None:
    """Turn meta tensors into fake ones on the CPU, whose kernels are then the ones traced."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


@contextmanager
def _copying_dropout() -> Iterator[None]:
    """Dropout copies: its arithmetic is slow on fake tensors, and all that counts is its output."""
    names = vars(lora_layers)
    identity_dropout = names["identity_dropout"]
    names["identity_dropout"] = _copy
    try:
        yield
    finally:
        names["identity_dropout"] = identity_dropout


def _copy(x_LF: Tensor, key_L: Tensor, key_F: Tensor, rate: float) -> Tensor:
    """A copy in the place of dropout.

    Raises:
        ValueError: the rows are not the chunk's tokens, so that masks have no identity to go by.
    """
    if len(x_LF) != len(key_L):
        raise ValueError(
            f"lora.dropout: got {rate:g}, but some layers of this model work on more than texts' "
            "tokens (DeBERTa's on relative positions); set it to 0, or name the others in "
            "lora.targets"
        )
    return x_LF.clone()


@contextmanager
def _one_expert() -> Iterator[None]:
    """Experts' products as one product: as many tokens go through, whichever expert has them.

    The kernel that groups them by expert is traced in bf16 only.
    """
    names = vars(torch.nn.functional)
    grouped_mm = names.get("grouped_mm")
    names["grouped_mm"] = _as_one_group
    try:
        yield
    finally:
        names.pop("grouped_mm")
        if grouped_mm is not None:
            names["grouped_mm"] = grouped_mm


def _as_one_group(x_LF: Tensor, weight_EFG: Tensor, *, offs: Tensor) -> Tensor:
    return x_LF @ weight_EFG[0]


class Tracer:
    """Traces chunks through one depth of a model.

    Args:
        config: transformers configuration of the base model.
        dtype: of its weights and arithmetic.
        lora, pooling, normalize: the recipe's.
        checkpointing: of no layer, or of all.
        num_layers: how many layers to build.
        capability: of the CUDA device whose kernels of attention are traced; None for the CPU's.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        lora: LoraSection,
        pooling: Pooling,
        *,
        normalize: bool,
        checkpointing: Checkpointing,
        num_layers: int,
        capability: tuple[int, int] | None,
    ) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._mode = FakeTensorMode()
        base = skeleton(with_layers(config, num_layers), dtype)
        clock = DropoutClock()
        with torch.device("meta"):
            model = attach_adapter(base, lora, clock, seed=0)
        set_checkpointing(model, int(checkpointing == "all"))
        with self._mode:
            _give_fake_storage(model)
        masked = declared_bidirectional(base)  # there is nothing to try it on
        self._encoder = Encoder(
            model, pooling=pooling, normalize=normalize, clock=clock, masked=masked
        )
        self._parameters = trainable_parameters(model)
        self._checkpointed = checkpointing == "all"
        self._attention = AsOnDevice(capability)
        self.dim = 0  # known after the first trace

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the adapter's gradients."""
        return sum(parameter.nbytes for parameter in self._parameters)

    @property
    def attention(self) -> dict[AttentionCall, Backend]:
        """How the layers call attention, and what computes it; known after the first trace."""
        return self._attention.backends

    def trace(self, num_texts: int, width: int) -> ChunkCost:
        """The cost of a chunk of B texts of T tokens."""
        from torch.utils.flop_counter import FlopCounterMode

        shape = (num_texts, width)
        training = self._encoder.training_mode(step=0)
        with self._mode, _copying_dropout(), _one_expert(), training, self._attention:
            for module in self._encoder.model.modules():
                if hasattr(module, "layerdrop"):  # its rate is 0, but the draw has no value here
                    module.training = False
            ids_BT, mask_BT = torch.zeros(shape, dtype=torch.int64), torch.ones(shape).bool()
            batch = TokenBatch(ids_BT, mask_BT, right_padded=True)
            known = [*self._encoder.model.parameters(), *self._encoder.model.buffers()]
            with torch.no_grad(), LiveBytes(known) as bare:
                if not self._checkpointed:
                    self._encoder(batch)
            # Under the counter checkpointing's tensors live longer; its FLOPs are the others'.
            flops = nullcontext() if self._checkpointed else FlopCounterMode(display=False)
            with LiveBytes(known) as live, flops as counter:
                emb_BD = self._encoder(batch)
                self.dim = int(emb_BD.shape[1])
                keep_bytes, graph_bytes = live.peak, live.now
                forward_flops = counter.get_total_flops() if counter else 0
                self._backward(emb_BD)
        return ChunkCost(
            graph_bytes=graph_bytes,
            forward_bytes=bare.peak,
            keep_bytes=keep_bytes,
            backward_bytes=live.peak,
            forward_flops=forward_flops,
            backward_flops=counter.get_total_flops() - forward_flops if counter else 0,
        )

    def _backward(self, emb_BD: Tensor) -> None:
        if not emb_BD.requires_grad:
            raise ValueError("lora.targets: no layer that is adapted takes part in the embedding")
        torch.autograd.grad(emb_BD, self._parameters, torch.ones_like(emb_BD), allow_unused=True)


class CostModel:
    """Chunk costs of a model of any depth, chunk of any shape.

    Each cost is a0 + a1 n + a2 n T with n = B T padded tokens, the last term for attention that
    holds its weights, and each of these is linear in depth: six traces determine them.

    Args:
        tracers: two, of the depths `_LAYERS`.
        num_layers: the model's depth.
        longest: T of the longest text, near which the traces are made.
        dtype: of the model's arithmetic.

    Attributes:
        dim: D of an embedding.
        attention: how the layers call attention, and what computes it.
    """

    def __init__(
        self, tracers: tuple[Tracer, Tracer], num_layers: int, longest: int, dtype: torch.dtype
    ) -> None:
        short = max(1, longest // 2)
        few = max(1, _TOKENS // short)
        shapes = [(few, short), (2 * few, short), (few, 2 * short)]
        basis = np.array([[1, b * t, b * t * t] for b, t in shapes], dtype=np.float64)
        self._low, self._high = (
            np.linalg.solve(basis, [astuple(tracer.trace(*shape)) for shape in shapes])
            for tracer in tracers
        )
        self.dim, self._dtype = tracers[0].dim, dtype
        self.attention = tracers[1].attention
        self._gradient_bytes = tracers[1].gradient_bytes - tracers[0].gradient_bytes
        self._depth = (num_layers - _LAYERS[1]) / (_LAYERS[1] - _LAYERS[0])

    def __call__(self, num_texts: float, width: int) -> ChunkCost:
        """The cost of a chunk of B texts of T tokens; B may be a mean."""
        high, slope = self._at(num_texts, width)
        # The peak is at the backward of the top layer, where all graphs are alive, or of the
        # bottom one, where all gradients are: which of them may change with depth.
        steepest = max(slope.backward_bytes, slope.graph_bytes, self._gradient_bytes)
        slope = replace(slope, backward_bytes=steepest)
        pairs = zip(astuple(high), astuple(slope), strict=True)
        cost = ChunkCost(*(float(at + self._depth * more) for at, more in pairs))
        unseen = self._unseen_bytes(math.ceil(num_texts), width)
        return replace(cost, backward_bytes=cost.backward_bytes + unseen)

    def _unseen_bytes(self, num_texts: int, width: int) -> int:
        """Bytes that a GPU's attention holds in the backward of one layer and no trace shows."""
        return max(
            (
                backward_bytes(call, num_texts, width, self._dtype, backend)
                for call, backend in self.attention.items()
            ),
            default=0,
        )

    def per_layer(self, num_texts: float, width: int) -> float:
        """Bytes of the graph of one layer that is not the last."""
        _, slope = self._at(num_texts, width)
        return slope.graph_bytes / (_LAYERS[1] - _LAYERS[0])

    def _at(self, num_texts: float, width: int) -> tuple[ChunkCost, ChunkCost]:
        """Costs at the greater depth traced, and what the way there from the lesser one added."""
        tokens = num_texts * width
        basis = np.array([1, tokens, tokens * width])
        return ChunkCost(*(basis @ self._high)), ChunkCost(*(basis @ (self._high - self._low)))


def cost_model(
    config: Any,
    dtype: torch.dtype,
    lora: LoraSection,
    pooling: Pooling,
    *,
    normalize: bool,
    checkpointing: Checkpointing,
    longest: int,
    capability: tuple[int, int] | None,
) -> CostModel:
    """Trace a configuration; see `Tracer` for the arguments, `CostModel` for `longest`.

    What was traced once in this process is remembered.
    """
    key = (
        config.to_json_string(),
        dtype,
        repr(lora),
        pooling,
        normalize,
        checkpointing,
        longest,
        capability,
    )
    if key not in _traced:
        with _readable_by_shapes(config):
            low, high = (
                Tracer(
                    config,
                    dtype,
                    lora,
                    pooling,
                    normalize=normalize,
                    checkpointing=checkpointing,
                    num_layers=num_layers,
                    capability=capability,
                )
                for num_layers in _LAYERS
            )
            _traced[key] = CostModel((low, high), config.num_hidden_layers, longest, dtype)
    return _traced[key]


@contextmanager
def _readable_by_shapes(config: Any) -> Iterator[None]:
    """Say of a model that reads numbers on the way, which a trace has none of, that it does.

    Raises:
        ValueError: it does.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
    )

    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"model.id: {config.model_type} models go by the numbers in their tensors "
            f"({error.func}), so that their memory cannot be planned, nor can they be trained "
            "here; name a model of another family"
        ) from error
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise
        raise ValueError(  # DeBERTa, before transformers 5.23
            f"model.id: {config.model_type} models run as TorchScript in this transformers, so that "
            "their memory cannot be planned; install a newer one, or name a model of another family"
        ) from error


_traced: dict[tuple[Any, ...], CostModel] = {}
