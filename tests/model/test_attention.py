"""Which kernel computes attention, and that plans for a GPU count what its backward holds."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowmem_cft.model.attention import (
    AsOnDevice,
    AttentionCall,
    Backend,
    SeenBackends,
    backend_for,
    backward_bytes,
    chosen_backends,
    padded_texts,
    whole_texts,
)
from lowmem_cft.planning.choice import Planner
from lowmem_cft.planning.footprint import Footprint
from lowmem_cft.planning.prediction import BatchShape
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.recipe.schema import MemorySection
from lowmem_cft.units import GIB
from plain import make_encoder
from tiny import tiny_config

BF16, FP32 = torch.bfloat16, torch.float32
MINICPM = AttentionCall(num_heads=36, num_kv_heads=36, head_dim=64)
WIDTHS = (4, 12, 64, 150)


def sums_bytes(num_texts: int, width: int, heads: int = 36, head_dim: int = 64) -> int:
    """The float32 sums of dQ and the row sums, written out for head sizes of whole 32s."""
    positions = {4: 128, 12: 128, 64: 128, 150: 256}[width]
    return 4 * num_texts * positions * heads * (head_dim + 1)


@pytest.mark.parametrize("width", WIDTHS)
def test_flash_sums_are_padded_to_tiles(width: int) -> None:
    assert backward_bytes(MINICPM, 512, width, BF16, Backend.FLASH) == sums_bytes(512, width)


def test_half_a_gibibyte_for_texts_of_four_tokens() -> None:
    """512 of them have 9 MiB of queries."""
    assert backward_bytes(MINICPM, 512, 4, BF16, Backend.FLASH) / GIB == pytest.approx(0.571, 1e-3)


@pytest.mark.parametrize(("head_dim", "padded"), [(80, 96), (96, 96), (128, 128), (256, 256)])
def test_heads_are_padded(head_dim: int, padded: int) -> None:
    call = AttentionCall(num_heads=8, num_kv_heads=8, head_dim=head_dim)
    wanted = 4 * 3 * 128 * 8 * (padded + 1)
    assert backward_bytes(call, 3, 20, BF16, Backend.FLASH) == wanted


@pytest.mark.parametrize("backend", [Backend.MATH, Backend.CPU, Backend.EAGER])
def test_what_a_trace_shows_is_not_counted_twice(backend: Backend) -> None:
    assert backward_bytes(MINICPM, 512, 4, BF16, backend) == 0


GROUPED = AttentionCall(num_heads=32, num_kv_heads=8, head_dim=128)


@pytest.mark.parametrize(
    ("call", "dtype", "capability", "wanted"),
    [
        (MINICPM, BF16, (8, 6), Backend.FLASH),
        (GROUPED, BF16, (9, 0), Backend.FLASH),
        (MINICPM, torch.float16, (7, 5), Backend.EFFICIENT),
        (GROUPED, torch.float16, (7, 5), Backend.MATH),
        (MINICPM, FP32, (8, 6), Backend.EFFICIENT),
        (GROUPED, FP32, (8, 6), Backend.MATH),
        (AttentionCall(8, 8, 64, masked=True), BF16, (8, 6), Backend.EFFICIENT),
        (AttentionCall(8, 8, 288), BF16, (8, 6), Backend.EFFICIENT),
    ],
)
def test_backend_by_dtype_card_and_heads(
    call: AttentionCall, dtype: torch.dtype, capability: tuple[int, int], wanted: Backend
) -> None:
    assert backend_for(call, dtype, capability) is wanted


def attend(**more: Any) -> torch.Tensor:
    query = torch.randn(2, 4, 8, 16)
    return F.scaled_dot_product_attention(query, query, query, is_causal=True, **more)


def test_backends_are_seen() -> None:
    with SeenBackends() as seen:
        attend()
    assert seen.names == ["cpu"]
    with SeenBackends() as seen, sdpa_kernel(SDPBackend.MATH):
        attend()
    assert seen.names == ["math"]
    with SeenBackends() as seen:
        torch.randn(3, 3).softmax(dim=1)
    assert seen.names == ["eager"]


def test_cudnn_is_left_out_and_nothing_else() -> None:
    cuda = torch.backends.cuda
    outside = cuda.cudnn_sdp_enabled()
    with chosen_backends():
        assert not cuda.cudnn_sdp_enabled()
        assert cuda.flash_sdp_enabled()
        assert cuda.mem_efficient_sdp_enabled()
        assert cuda.math_sdp_enabled()
    assert cuda.cudnn_sdp_enabled() == outside


def test_an_encoder_notes_what_computed_its_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder("llama")
    assert encoder.attention == []
    cudnn: list[bool] = []
    layer = encoder.model.get_base_model().layers[0]
    layer.register_forward_hook(lambda *_: cudnn.append(torch.backends.cuda.cudnn_sdp_enabled()))
    batch = chunk_of(8)
    encoder(batch)
    with encoder.training_mode(step=0):
        assert not torch.backends.cuda.cudnn_sdp_enabled()  # as in a checkpointed backward
        encoder(batch)
    assert encoder.attention == ["cpu"]
    assert cudnn == [False, False]


def chunk_of(width: int) -> Any:
    from lowmem_cft.data.chunks import TokenBatch

    ids_BT = torch.randint(4, 60, (3, width))
    return TokenBatch(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), right_padded=True)


def test_packed_positions_are_looked_for_outside_and_in_other_threads() -> None:
    from transformers import masking_utils

    packed = torch.tensor([[0, 1, 2, 0, 1]])
    with whole_texts():
        assert masking_utils.find_packed_sequence_indices(packed) is None
        elsewhere: list[Any] = []
        thread = threading.Thread(
            target=lambda: elsewhere.append(masking_utils.find_packed_sequence_indices(packed))
        )
        thread.start()
        thread.join()
        assert elsewhere[0].tolist() == [[0, 0, 0, 1, 1]]
        with whole_texts():
            pass
        assert masking_utils.find_packed_sequence_indices(packed) is None
    assert masking_utils.find_packed_sequence_indices(packed).tolist() == [[0, 0, 0, 1, 1]]


def test_a_mask_without_padding_is_kept_where_texts_are_padded() -> None:
    from transformers import masking_utils

    mask_11 = torch.ones(2, 5, dtype=torch.bool)
    names = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
    sizes = {"_ignore_causal_mask_sdpa": (5, 5, 0, 0), "_ignore_bidirectional_mask_sdpa": (5,)}

    def dropped() -> list[bool]:
        return [bool(getattr(masking_utils, n)(mask_11, *sizes[n])) for n in names]

    with padded_texts():
        assert dropped() == [False, False]
        assert masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0]])) is None
    assert dropped() == [True, True]


def test_a_trace_holds_weights_of_attention_where_a_card_would() -> None:
    """Texts of grouped heads in float32: no fused kernel takes them."""
    query, key = torch.randn(2, 4, 64, 16), torch.randn(2, 2, 64, 16)
    for capability, wanted in {None: Backend.CPU, (8, 6): Backend.MATH}.items():
        with AsOnDevice(capability) as attention, SeenBackends() as seen:
            F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
        assert attention.backends == {AttentionCall(4, 2, 16): wanted}
        assert seen.names == [wanted.value]


def test_checkpointed_layers_are_traced_as_a_card_computes_them() -> None:
    """Grouped heads in float32 hold their weights in the backward's second forward, too."""
    footprint = {
        device: Footprint(load_recipe("demo"), tiny_config("llama"), FP32, 64, device)
        for device in ("cuda", "cpu")
    }
    card, cpu = (footprint[name].chunk_costs("all")(8, 64) for name in ("cuda", "cpu"))
    weights = 4 * 8 * tiny_config("llama").num_attention_heads * 64 * 64
    assert card.backward_bytes - cpu.backward_bytes > weights


# -- the planner ------------------------------------------------------------------------------


def minicpm_planner(device_type: str, dtype: torch.dtype = BF16, layers: int = 40) -> Planner:
    """The widths of MiniCPM-2B, which are all that fake tensors need."""
    config = tiny_config("minicpm")
    config.hidden_size, config.intermediate_size = 2304, 5760
    config.num_attention_heads = config.num_key_value_heads = 36
    config.num_hidden_layers, config.vocab_size = layers, 122753
    config.max_position_embeddings = 4096
    recipe = load_recipe("cft-minicpm-2b")
    return Planner(Footprint(recipe, config, dtype, 151, device_type))


@pytest.fixture(scope="module")
def on_card() -> Planner:
    return minicpm_planner("cuda")


@pytest.fixture(scope="module")
def on_cpu() -> Planner:
    return minicpm_planner("cpu")


@pytest.mark.parametrize("checkpointing", ["none", "all"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_plan_for_a_card_counts_the_sums(
    on_card: Planner, on_cpu: Planner, width: int, checkpointing: Any
) -> None:
    num_texts = 2048 // width
    card, cpu = (
        planner.footprint.chunk_costs(checkpointing)(num_texts, width)
        for planner in (on_card, on_cpu)
    )
    more = card.backward_bytes - cpu.backward_bytes
    assert more == pytest.approx(sums_bytes(num_texts, width), rel=1e-9)
    assert card.forward_bytes == cpu.forward_bytes
    assert card.graph_bytes == cpu.graph_bytes


def lengths_like_nli(num_texts: int) -> Any:
    """Mean 14, most below 40, some of 3 or 4 tokens and some of 150."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.gamma(4.0, 3.5, num_texts).astype(int), 3, 40)
    lengths[: num_texts // 500] = 150
    return draw.permutation(lengths)


def test_the_plan_of_1024_rows_fits_12_gib_with_the_sums(on_card: Planner) -> None:
    """The dearest of its chunks is short texts, whose activations alone are far from the limit."""
    shape = BatchShape(1024, 3, 151, lengths_like_nli(3 * 1024))
    section = MemorySection(keep_graphs="off", checkpointing="on")
    prediction = on_card.choose(section, shape, 12 * GIB)
    assert prediction.peak_bytes <= 12 * GIB
    assert prediction.moment == "backward"
    cost = on_card.footprint.chunk_costs("all")
    shapes = shape.cut(prediction.plan.backward_tokens, on_card.chunk_cost).shapes
    totals = {shape: cost(*shape).backward_bytes for shape in shapes}
    dearest = max(totals, key=lambda shape: totals[shape])
    assert prediction.parts["activations"] >= totals[dearest]
    assert dearest[1] < 20, "no short texts in the batch"
    assert sums_bytes(dearest[0], 12) > 0.15 * totals[dearest]


def test_short_texts_can_need_most_memory(on_card: Planner, on_cpu: Planner) -> None:
    """As many tokens in texts of four as in texts of 128."""
    short, long = (
        {
            planner: planner.footprint.chunk_costs("all")(2048 // width, width).backward_bytes
            for planner in (on_card, on_cpu)
        }
        for width in (4, 128)
    )
    assert short[on_card] > 1.5 * long[on_card]
    assert short[on_cpu] == pytest.approx(long[on_cpu], rel=0.05)


def test_a_large_batch_fills_chunks_of_short_texts(on_card: Planner) -> None:
    """A sample has few texts of three tokens; 196,608 texts fill chunks of 2,048 tokens with them."""
    shape = BatchShape(65536, 3, 151, lengths_like_nli(3 * 65536))
    shortest = min(shape.cut(2048, on_card.chunk_cost).shapes, key=lambda pair: pair[1])
    assert shortest == (2048 // 3, 3)
