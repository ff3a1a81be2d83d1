"""Whatever the plan of a step, its gradient is the plain full-batch one, dropout included."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bidirectional import BIDIRECTIONAL
from bidirectional import build as build_bidirectional
from lowmem_cft.data.batches import StepTexts
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.gradient.step import candidates_of
from lowmem_cft.model.adapter import set_checkpointing
from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.model.configs import disable_base_dropout
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.model.patches import patched_layers
from lowmem_cft.recipe.schema import LossSection, ModelSection
from lowmem_cft_kernels import LearnedTemperature, LossOptions
from lowmem_cft_kernels.reference import reference_loss
from numerics import assert_same, gradients, relative_error
from plain import (
    LOSS,
    Batch,
    make_batch,
    make_encoder,
    plain_gradients,
    planned_gradients,
    reference_options,
)
from tiny import FAMILIES, save_tiny, tiny_config

BATCHES = st.builds(
    make_batch,
    rows=st.integers(2, 7),
    negatives=st.integers(0, 4),
    texts=st.integers(2, 20),
    longest=st.sampled_from([1, 4, 12]),
    seed=st.integers(0, 1000),
)
PLANS = st.builds(
    StepPlan,
    backward_tokens=st.sampled_from([1, 5, 24, 1000]),
    forward_tokens=st.sampled_from([1, 9, 60, 1000]),
    kept_tokens=st.sampled_from([None, 0, 7, 30]),
    checkpoint_every=st.sampled_from([0, 1, 2]),
    offload_embeddings=st.booleans(),
    workspace_bytes=st.sampled_from([1, 2**25]),
)
DROPOUTS = st.sampled_from([0.0, 0.3])
SIMPLE = StepPlan(backward_tokens=24, forward_tokens=60)


def assert_equals_plain(
    encoder: Any, batch: Batch, plan: StepPlan, bound: float, **texts_options: Any
) -> None:
    texts = batch.texts(**{"twins_once": True, **texts_options})
    got, report = planned_gradients(encoder, batch, texts, plan)
    assert report.plan == plan, "memory did not run out, yet the plan changed"
    wanted = plain_gradients(encoder, batch, texts)
    # Some gradients are 0 but for rounding: all of them where an anchor sees one document only,
    # those of queries and keys where every text is a single token.
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    floor = max(bound * largest, bound)
    real = {name for name, gradient in wanted.items() if float(gradient.abs().max()) > floor}
    assert all(float(got[name].abs().max()) <= 2 * floor for name in wanted.keys() - real)
    if not real:
        return
    if encoder.model.dtype == torch.float64:
        assert_same({n: got[n] for n in real}, {n: wanted[n] for n in real}, bound)
    else:
        # As one vector: in a tensor of small gradients plain float32 is itself off by more.
        assert_same({"all": flat(got)}, {"all": flat(wanted)}, bound)


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([found[name].flatten() for name in sorted(found)])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    batch=BATCHES,
    plan=PLANS,
    family=st.sampled_from(FAMILIES),
    dropout=DROPOUTS,
    pooling=st.sampled_from(["eos", "mean", "weighted-mean"]),
    twins_once=st.booleans(),
    hard_negatives=st.sampled_from(["batch", "own", "none"]),
)
def test_any_plan_in_float64(
    batch: Batch,
    plan: StepPlan,
    family: str,
    dropout: float,
    pooling: str,
    twins_once: bool,
    hard_negatives: str,
) -> None:
    encoder = make_encoder(family, dropout, pooling=pooling)
    assert_equals_plain(
        encoder, batch, plan, 1e-10, twins_once=twins_once, hard_negatives=hard_negatives
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(batch=BATCHES, plan=PLANS, family=st.sampled_from(FAMILIES), dropout=DROPOUTS)
def test_any_plan_in_float32(batch: Batch, plan: StepPlan, family: str, dropout: float) -> None:
    assert_equals_plain(make_encoder(family, dropout, dtype=torch.float32), batch, plan, 1e-5)


def alone_gradients(encoder: Encoder, batch: Batch, texts: StepTexts) -> dict[str, Tensor]:
    """Gradients of the step where transformers embeds each text by itself, without any padding."""
    encoder.model.zero_grad()
    set_checkpointing(encoder.model, 0)
    with patched_layers(encoder.model).lifted("forward"):
        ids = [torch.from_numpy(batch.store[i].astype("int64"))[None] for i in texts.text_P]
        hidden = [encoder.model(input_ids=ids_1T)[0][0] for ids_1T in ids]
        read = {"eos": lambda h_TH: h_TH[-1], "cls": lambda h_TH: h_TH[0], "mean": mean_of_tokens}
        emb_PD = torch.stack([read[encoder.pooling](hidden_TH) for hidden_TH in hidden])
        emb_SD = torch.nn.functional.normalize(emb_PD, dim=1)[texts.place_S]
        query_MD, doc_ND = emb_SD.tensor_split([texts.num_queries])
        options = LossOptions(temperature=LOSS.temperature, **reference_options(LOSS))
        value, _ = reference_loss(query_MD, doc_ND, candidates_of(texts), options)
        value.backward()
    return gradients(encoder.model)


def mean_of_tokens(hidden_TH: Tensor) -> Tensor:
    return hidden_TH.mean(dim=0)


@pytest.mark.parametrize(
    ("family", "pooling"), list(zip(BIDIRECTIONAL, cycle(["cls", "mean", "eos"]), strict=False))
)
def test_any_plan_where_tokens_see_those_behind_them(family: str, pooling: str) -> None:
    base = build_bidirectional(BIDIRECTIONAL[family]())
    encoder = make_encoder(pooling=pooling, base=base)
    batch = make_batch(6, 1, texts=12, seed=3)
    texts = batch.texts(twins_once=True)
    wanted = alone_gradients(encoder, batch, texts)
    every = 2 if base.supports_gradient_checkpointing else 0
    for tokens, kept, k in ((1, 0, 0), (24, 30, every), (1000, None, 0)):
        plan = StepPlan(
            backward_tokens=tokens, forward_tokens=2 * tokens, kept_tokens=kept, checkpoint_every=k
        )
        got, _ = planned_gradients(encoder, batch, texts, plan)
        assert_same({"all": flat(got)}, {"all": flat(wanted)}, 1e-9)


def test_dropout_is_a_texts_own_where_tokens_see_those_behind_them() -> None:
    encoder = make_encoder(dropout=0.3, pooling="cls", base=build_bidirectional(_bert()))
    batch = make_batch(6, 1, texts=12, seed=3)
    texts = batch.texts(twins_once=True)
    plans = [
        StepPlan(backward_tokens=tokens, forward_tokens=tokens, kept_tokens=0)
        for tokens in (1, 1000)
    ]
    (small, _), (large, _) = (planned_gradients(encoder, batch, texts, plan) for plan in plans)
    assert_same({"all": flat(small)}, {"all": flat(large)}, 1e-9)


def _bert() -> Any:
    return BIDIRECTIONAL["bert"]()


@pytest.fixture(scope="module")
def nf4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("nf4") / "llama")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kept", [None, 0, 30])
@pytest.mark.parametrize("every", [0, 2])
def test_nf4(nf4_folder: Path, dropout: float, kept: int | None, every: int) -> None:
    section = ModelSection(id=str(nf4_folder), quantization="nf4", dtype="fp32")
    base = load_backbone(section, torch.device("cpu")).model
    assert any(type(module).__name__ == "Linear4bit" for module in base.modules())
    encoder = make_encoder(dropout=dropout, dtype=torch.float32, base=base)
    plan = StepPlan(backward_tokens=20, forward_tokens=40, kept_tokens=kept, checkpoint_every=every)
    assert_equals_plain(encoder, make_batch(6, 2, seed=4), plan, 1e-5)


@pytest.mark.parametrize("family", ["llama", "phi-2", "opt"])
def test_bfloat16_is_as_near_to_the_truth_as_plain_torch(family: str) -> None:
    """Summed over many gradients: single elements differ by luck."""
    from transformers import AutoModel

    batch = make_batch(8, 2, texts=30, seed=2)
    texts = batch.texts(twins_once=True)

    def base(dtype: torch.dtype) -> Any:
        torch.manual_seed(1)
        config = tiny_config(family)
        disable_base_dropout(config)
        return AutoModel.from_config(config).bfloat16().to(dtype)

    def make(dtype: torch.dtype) -> Any:
        return make_encoder(family, dtype=dtype, base=base(dtype))

    true = plain_gradients(make(torch.float64), batch, texts)
    with torch.autocast("cpu", torch.bfloat16):
        plain = plain_gradients(make(torch.bfloat16), batch, texts)
    ours, _ = planned_gradients(make(torch.bfloat16), batch, texts, SIMPLE)

    def error(found: dict[str, Tensor]) -> float:
        errors = [float((found[n].double() - g).norm() / g.norm()) for n, g in true.items()]
        return sum(errors) / len(errors)

    assert 0 < error(plain) < 1, "plain torch is far off: the models differ"
    assert 0 < error(ours) <= 1.5 * error(plain)


def count_encodes(encoder: Any) -> list[bool]:
    """One entry per forward: whether it made a graph."""
    calls: list[bool] = []
    encoder.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


def test_kept_chunks_are_encoded_once() -> None:
    batch = make_batch(6, 2, texts=14, longest=12)
    texts = batch.texts(twins_once=True)
    tokens = int(batch.store.lengths[texts.text_P].sum())
    passes = {}
    for kept in (0, tokens // 2, None):
        encoder = make_encoder()
        calls = count_encodes(encoder)
        plan = StepPlan(backward_tokens=12, forward_tokens=12, kept_tokens=kept)
        _, report = planned_gradients(encoder, batch, texts, plan)
        passes[kept] = calls.count(False), calls.count(True)
        assert report.padded_tokens >= report.tokens
    (none_first, none_second), (_, half), (all_first, all_second) = passes.values()
    assert all_first == 0
    assert all_second == none_second == half > 3
    assert none_first > passes[tokens // 2][0] > 0


def test_checkpointing_computes_the_chosen_layers_again() -> None:
    batch = make_batch(6, 2)
    for every, wanted in ((0, [1, 1, 1]), (1, [2, 2, 2]), (2, [1, 2, 1])):
        encoder = make_encoder()
        chunks = count_encodes(encoder)
        counts = [0, 0, 0]
        for i, layer in enumerate(encoder.model.get_base_model().layers):
            # not the whole layer: what is computed again stops as soon as it has what it needs
            layer.self_attn.register_forward_hook(
                lambda *_, i=i, counts=counts: counts.__setitem__(i, counts[i] + 1)
            )
        plan = StepPlan(
            backward_tokens=1000, forward_tokens=1000, kept_tokens=None, checkpoint_every=every
        )
        planned_gradients(encoder, batch, batch.texts(twins_once=True), plan)
        assert counts == [len(chunks) * times for times in wanted]


MARGIN = {"false_negative_margin": 0.05}
HARDNESS = {"hardness": 9.0}
LOSSES: dict[str, dict[str, Any]] = {
    "symmetric": {"softmaxes": "symmetric"},
    "gte": {"softmaxes": "gte"},
    "qwen3": {"softmaxes": "qwen3"},
    "margin": MARGIN,
    "margin below 0": {"false_negative_margin": -0.05},
    "relative margin": {"false_negative_margin": 0.2, "false_negative_relative": True},
    "hardness": HARDNESS,
    "hardness on hard": {**HARDNESS, "hardness_on": "hard"},
    "hardness in batch": {**HARDNESS, "hardness_on": "in-batch"},
    "symmetric, all": {"softmaxes": "symmetric", **MARGIN, **HARDNESS},
    "gte, all": {"softmaxes": "gte", **MARGIN, **HARDNESS, "hardness_on": "hard"},
    "qwen3, all": {"softmaxes": "qwen3", **MARGIN, **HARDNESS, "hardness_on": "in-batch"},
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_a_recipe_has_the_plain_gradient(name: str) -> None:
    batch = make_batch(7, 3, texts=20)
    texts, section = batch.texts(twins_once=True), LossSection(temperature=0.1, **LOSSES[name])
    plan = StepPlan(backward_tokens=24, forward_tokens=60, kept_tokens=24, workspace_bytes=1)
    got, report = planned_gradients(make_encoder(), batch, texts, plan, loss=section)
    wanted = plain_gradients(make_encoder(), batch, texts, section)
    assert_same(got, wanted, 1e-10)
    others = {key: value for key, value in LOSSES[name].items() if key != "hardness_on"}
    for key in others:  # each option counts: without it the gradient is another one
        rest = {k: v for k, v in LOSSES[name].items() if not k.startswith(key)}
        if key == "false_negative_margin":
            rest.pop("false_negative_relative", None)
        without = LossSection(temperature=0.1, **rest)
        other = plain_gradients(make_encoder(), batch, texts, without)
        assert relative_error(flat(other), flat(wanted)) > 0.01, key
    visible = 1 - float(report.loss_report.observed.masked_share)
    assert 0.3 < visible < 1, "the margin hides all negatives or none"


@pytest.mark.parametrize("softmaxes", ["one_way", "gte"])
def test_a_learned_temperature_has_the_plain_gradient(softmaxes: Any) -> None:
    batch = make_batch(7, 3, texts=20)
    texts = batch.texts(twins_once=True)
    loss = LossSection(temperature=0.5, softmaxes=softmaxes)  # of no effect: it is learned
    plain, ours = (LearnedTemperature(0.1).double() for _ in range(2))
    wanted = plain_gradients(make_encoder(), batch, texts, loss, plain())
    wanted["raw"] = plain.raw.grad
    encoder = make_encoder()
    for times in (1, 2):  # a second step is added to the first
        got, report = planned_gradients(
            encoder, batch, texts, SIMPLE, loss=loss, temperature=ours, gradient_scale=8.0
        )
        assert_same(got, {k: 8 * v for k, v in wanted.items() if k != "raw"}, 1e-10)
        assert_same({"raw": ours.raw.grad}, {"raw": 8 * times * wanted["raw"]}, 1e-10)
    assert torch.equal(report.loss_report.temperature, ours())
    assert ours().item() == pytest.approx(0.1)
    assert not report.loss_report.temperature.requires_grad


def test_a_temperature_that_is_not_learned_has_no_part_in_the_report() -> None:
    batch = make_batch(4, 1)
    _, report = planned_gradients(make_encoder(), batch, batch.texts(twins_once=True), SIMPLE)
    assert report.loss_report.temperature is None
    assert report.loss_report.d_raw is None


def test_gradient_scale_multiplies() -> None:
    batch = make_batch(5, 1)
    texts = batch.texts(twins_once=True)
    once, _ = planned_gradients(make_encoder(), batch, texts, SIMPLE)
    scaled, _ = planned_gradients(make_encoder(), batch, texts, SIMPLE, gradient_scale=8.0)
    assert_same(scaled, {name: 8 * gradient for name, gradient in once.items()}, 1e-12)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_embeddings_in_16_bits_are_rounded_and_no_more(dtype: str) -> None:
    batch = make_batch(6, 2, texts=14)
    texts = batch.texts(twins_once=True)
    plan = StepPlan(backward_tokens=24, forward_tokens=60, embedding_dtype=dtype)
    got, _ = planned_gradients(make_encoder(dtype=torch.float32), batch, texts, plan)
    wanted = plain_gradients(make_encoder(dtype=torch.float32), batch, texts)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(got, wanted, 1e-6)
    # half a unit in the last place of an embedding, times 2 / temperature in the loss's curvature
    assert_same(got, wanted, 20 * 2.0 ** (-9 if dtype == "bf16" else -12))


def test_dropout_is_active_and_depends_on_the_step() -> None:
    from lowmem_cft.data.chunks import pad

    batch, encoder = make_batch(5, 1), make_encoder(dropout=0.3)
    padded = pad(batch.store, torch.arange(9).numpy(), 3)

    def embedded(step: int | None) -> Tensor:
        with torch.no_grad(), nullcontext() if step is None else encoder.training_mode(step):
            return encoder(padded)

    assert torch.equal(embedded(1), embedded(1))
    assert not torch.allclose(embedded(1), embedded(None))
    assert not torch.allclose(embedded(1), embedded(2))
