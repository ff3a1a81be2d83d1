"""A prefix that is run once gives the embeddings of texts that hold it, or is refused and said so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bidirectional import BIDIRECTIONAL
from bidirectional import build as build_bidirectional
from lowmem_cft.data.chunks import pad
from lowmem_cft.data.tokens import TextFormat, TokenStore
from lowmem_cft.inference import prefix_sharing as sharing
from lowmem_cft.inference.embed import Vectors, embed_texts
from lowmem_cft.inference.prefix_sharing import behind
from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.model.configs import disable_base_dropout
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.model.prefix import NotShared, run_prefix
from lowmem_cft.planning.live_bytes import LiveBytes
from lowmem_cft.recipe.schema import ModelSection
from plain import make_encoder
from tiny import FAMILIES, SIZES, save_tiny, tiny_config, tiny_tokenizer

PAD = 3
WINDOW = 6
TEMPLATE = TextFormat(
    "the man is not happy . a big red dog ran . {text} is", append_eos=False, max_tokens=64
)
TEXTS = [
    f"{number} {color} {animal} {verb} {where}".strip()
    for number in ("one", "two", "three")
    for color in ("red", "blue big", "small")
    for animal in ("cat", "dog")
    for verb in ("ran", "sat quickly and slowly")
    for where in ("", "over the river in the rain under the sun and the tree .")
]


def _window(maker: str) -> Callable[[], Any]:
    def make() -> Any:
        import transformers as t

        heads = {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
        return getattr(t, maker)(**SIZES, **heads, sliding_window=WINDOW)

    return make


def _gemma3() -> Any:
    """Windows in all layers but the last."""
    config = _window("Gemma3TextConfig")()
    config.layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
    return config


def _neox() -> Any:
    import transformers as t

    return t.GPTNeoXConfig(**SIZES, intermediate_size=128)


CONFIGS: dict[str, Callable[[], Any]] = {
    **{family: lambda family=family: tiny_config(family) for family in FAMILIES},
    "gpt-neox": _neox,
    "mistral": _window("MistralConfig"),
    "gemma-2": _window("Gemma2Config"),
    "gemma-3": _gemma3,
}
EAGER_ONLY = ("gemma-2",)
CASES = [
    (family, attention)
    for family in CONFIGS
    for attention in ("sdpa", "eager")
    if not (attention == "sdpa" and family in EAGER_ONLY)
]


def build(config: Any, attention: str = "sdpa") -> Any:
    """A random base model in which every token counts for those behind it."""
    from transformers import AutoModel

    torch.manual_seed(0)
    disable_base_dropout(config)
    model = AutoModel.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def ids_of(num_prefix: int) -> tuple[list[int], TokenStore]:
    """A prefix, and texts that begin with it; one of them holds a single token more."""
    draw = np.random.default_rng(num_prefix)
    prefix = draw.integers(4, 40, num_prefix).tolist()
    return prefix, TokenStore.from_lists(
        [prefix + draw.integers(4, 40, n).tolist() for n in (1, 2, 5, 11, 17)]
    )


@torch.no_grad()
def three_ways(encoder: Encoder, num_prefix: int) -> tuple[Any, Any, Any]:
    """Embeddings: each text whole and alone; all in a batch behind the prefix; without a prefix."""
    prefix, store = ids_of(num_prefix)
    every = np.arange(len(store))
    whole = torch.cat([encoder(pad(store, every[i : i + 1], PAD)) for i in every])
    own = pad(behind(store, every, num_prefix), every, PAD)
    run = run_prefix(encoder.model, torch.tensor(prefix))
    return whole, encoder(own, prefix=run), encoder(own)


def check_same(encoder: Encoder, num_prefix: int = 9) -> None:
    whole, shared, without = three_ways(encoder, num_prefix)
    assert float(whole.std(dim=0).max()) > 0.05, "the texts embed alike: nothing is compared"
    assert float((whole - without).abs().max()) > 0.05, "the prefix changes nothing"
    assert float((whole - shared).abs().max()) < 1e-5


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_same_embeddings(family: str, attention: str) -> None:
    model = build(CONFIGS[family](), attention)
    assert model.config._attn_implementation == attention
    check_same(Encoder(model, pooling="last", normalize=True))


@pytest.mark.parametrize("num_prefix", [1, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
@pytest.mark.parametrize("family", ["mistral", "gemma-3"])
def test_a_prefix_about_as_long_as_the_window(family: str, num_prefix: int) -> None:
    encoder = Encoder(build(CONFIGS[family]()), pooling="last", normalize=True)
    prefix, _ = ids_of(num_prefix)
    cache = run_prefix(encoder.model, torch.tensor(prefix)).cache
    kept = {layer.keys.shape[2] for layer in cache.layers}
    in_window = min(num_prefix, WINDOW - 1)
    assert kept == {"mistral": {in_window}, "gemma-3": {in_window, num_prefix}}[family]
    check_same(encoder, num_prefix)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_an_adapter_and_after_training(family: str) -> None:
    """Layers that compute only what is read in training are whole again in evaluation."""
    encoder = make_encoder(family, 0.1, dtype=torch.float32, pooling="last")
    for name, parameter in encoder.model.named_parameters():
        if parameter.ndim >= 2:
            parameter.data.mul_(6 if "lora" not in name else 2)
    _, store = ids_of(3)
    with encoder.training_mode(1):
        encoder(pad(store, np.arange(len(store)), PAD)).sum().backward()
    check_same(encoder)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_in_4_bit(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / family, family)
    backbone = load_backbone(ModelSection(id=str(folder), dtype="fp32"), torch.device("cpu"))
    assert "Linear4bit" in {type(module).__name__ for module in backbone.model.modules()}
    whole, shared, without = three_ways(
        Encoder(backbone.model, pooling="last", normalize=True), num_prefix=9
    )
    assert float((whole - without).abs().max()) > 1e-3
    assert float((whole - shared).abs().max()) < 1e-5


def test_nothing_of_a_chunk_is_kept() -> None:
    encoder = Encoder(build(CONFIGS["llama"]()), pooling="last", normalize=True)
    prefix, store = ids_of(9)
    run = run_prefix(encoder.model, torch.tensor(prefix))
    states = [(layer.keys, layer.keys.clone(), layer.values.clone()) for layer in run.cache.layers]
    every = np.arange(len(store))
    own = behind(store, every, 9)
    embeddings = []
    with torch.no_grad():
        for places in (every, every[2:4], every):
            embeddings.append(encoder(pad(own, places, PAD), prefix=run))
    assert torch.equal(embeddings[0], embeddings[2])
    for layer, (keys, old_keys, old_values) in zip(run.cache.layers, states, strict=True):
        assert layer.keys is keys
        assert torch.equal(layer.keys, old_keys)
        assert torch.equal(layer.values, old_values)
        assert layer.get_seq_length() == 9


def test_memory_of_one_layer_whatever_the_depth() -> None:
    """A prefix longer than the texts, joined in all layers at once, would weigh most."""
    prefix, _ = ids_of(40)
    store = TokenStore.from_lists([[5, 6]] * 64)
    peaks = []
    for depth in (2, 8):
        config = tiny_config("llama")
        config.num_hidden_layers = depth
        encoder = Encoder(build(config), pooling="last", normalize=True)
        run = run_prefix(encoder.model, torch.tensor(prefix))
        batch = pad(store, np.arange(64), PAD)
        with torch.no_grad(), LiveBytes(encoder.model.parameters()) as live:
            encoder(batch, prefix=run)
        peaks.append(live.peak)
    joined = 2 * 4 * 64 * 42 * 2 * 16  # keys and values, float32, texts, tokens, heads, numbers
    assert peaks[0] > joined, "the joined keys and values were not counted"
    assert peaks[1] - peaks[0] < joined / 4


# --- refused ----------------------------------------------------------------------------------


def _embed(
    model: Any, *, pooling: Any = "last", masked: bool | None = None, **options: Any
) -> tuple[Vectors, list[str]]:
    said: list[str] = []
    encoder = Encoder(model, pooling=pooling, normalize=True, masked=masked)
    vectors = embed_texts(encoder, tiny_tokenizer(), TEXTS, TEMPLATE, say=said.append, **options)
    return vectors, said


def _apart(a: Vectors, b: Vectors) -> float:
    assert float(a.std(axis=0).max()) > 1e-2, "the texts embed alike: nothing is compared"
    return float(np.abs(a - b).max())


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the prefixes that are run."""
    lengths: list[int] = []

    def counted(model: Any, ids_K: Any) -> Any:
        lengths.append(len(ids_K))
        return run_prefix(model, ids_K)

    monkeypatch.setattr(sharing, "run_prefix", counted)
    return lengths


def test_shared_and_not_a_word_of_it(runs: list[int]) -> None:
    model = build(tiny_config("opt"))
    (shared, said), (plain, _) = (_embed(model, share_prefix=on) for on in (True, False))
    assert runs == [12]
    assert said == []
    assert 0 < _apart(shared, plain) < 1e-5


def _hybrid(name: str) -> Any:
    import transformers as t

    if name == "mamba":
        return t.MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2)
    heads = {"intermediate_size": 128, "num_key_value_heads": 2}
    if name == "lfm2":
        types = ["conv", "full_attention", "conv"]
        return t.Lfm2Config(**SIZES, **heads, layer_types=types)
    window = {"max_position_embeddings": 128, "vocab_size": 64, "hidden_size": 64}
    return t.RecurrentGemmaConfig(**window, num_hidden_layers=3, num_attention_heads=4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "keeps no keys and values"),
        ("recurrent-gemma", "keeps no keys and values"),
        ("lfm2", "not keys and values alone"),
    ],
)
def test_a_recurrent_model_is_embedded_the_plain_way(name: str, reason: str) -> None:
    model = build(_hybrid(name), "eager")
    (asked, said), (plain, silent) = (_embed(model, share_prefix=on) for on in (True, False))
    assert len(said) == 1
    assert said[0].startswith("the 12 tokens that texts begin with are run anew in each: ")
    assert reason in said[0]
    assert silent == []
    assert _apart(asked, plain) < 1e-6


@pytest.mark.parametrize("family", ["gemma-3", "bert", "llama"])
def test_a_model_that_sees_what_follows_runs_no_prefix(family: str, runs: list[int]) -> None:
    model = build_bidirectional(BIDIRECTIONAL[family](), torch.float32)
    (asked, said), (plain, _) = (_embed(model, share_prefix=on) for on in (True, False))
    assert runs == []
    assert len(said) == 1
    assert "they see the texts that follow them" in said[0]
    assert _apart(asked, plain) < 1e-6


def test_a_model_that_is_wrongly_taken_for_causal_is_found_out() -> None:
    model = build_bidirectional(BIDIRECTIONAL["gemma-3"](), torch.float32)
    _, said = _embed(model, masked=False)
    assert len(said) == 1
    assert "embeds otherwise" in said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_positions_are_found_out(dtype: torch.dtype) -> None:
    model = build(tiny_config("smollm")).to(dtype)
    forward = model.forward

    def without_offset(**arguments: Any) -> Any:
        length = arguments["input_ids"].shape[1]
        return forward(**arguments, position_ids=torch.arange(length)[None])

    model.forward = without_offset
    _, said = _embed(model)
    assert len(said) == 1
    assert "embeds otherwise" in said[0]


def test_rounding_in_16_bit_is_no_reason(runs: list[int]) -> None:
    for family in ("llama", "opt", "gemma", "phi-2"):
        _, said = _embed(build(tiny_config(family)).to(torch.bfloat16))
        assert said == []
    assert runs == [12] * 4


def test_mean_pooling_is_not_shared(runs: list[int]) -> None:
    model = build(tiny_config("llama"))
    (asked, said), (plain, _) = (
        _embed(model, pooling="mean", share_prefix=on) for on in (True, False)
    )
    assert runs == said == []
    assert _apart(asked, plain) == 0


@pytest.mark.parametrize(
    ("template", "texts", "shared"),
    [
        ("the man is {text} is", TEXTS, False),
        ("the man is not {text} is", TEXTS, True),
        (TEMPLATE.template, TEXTS[:4], False),
        ("{text} the man is not happy . a big red dog ran .", TEXTS, False),
    ],
    ids=["too short", "long enough", "few texts", "behind the text"],
)
def test_what_saves_too_little_is_not_shared(
    runs: list[int], template: str, texts: list[str], shared: bool
) -> None:
    encoder = Encoder(build(tiny_config("llama")), pooling="last", normalize=True)
    texts = texts + [f"{text} not" for text in texts if len(texts) > 4]
    texts += [f"{text} house" for text in texts if len(texts) > 4]
    embed_texts(encoder, tiny_tokenizer(), texts, TextFormat(template, False, 64))
    assert bool(runs) == shared


def test_tried_once_for_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(sharing, "_try_out", lambda *args: tried.append(1))
    encoder = Encoder(build(tiny_config("llama")), pooling="last", normalize=True)
    for texts in (TEXTS, TEXTS[::-1], [*TEXTS, f"{TEXTS[-1]} {TEXTS[-1]}"]):
        embed_texts(encoder, tiny_tokenizer(), texts, TEMPLATE)
        if len(tried) == 1:
            longest = encoder.proven_prefix.longest
    assert len(tried) == 2, "a longer text has to be tried, the same length not again"
    assert encoder.proven_prefix.longest > longest > 0


# --- memory runs out --------------------------------------------------------------------------


class Small(Encoder):
    """Has memory for so many padded tokens, or for none where a prefix is shared."""

    most = 10**9
    with_prefix = True
    refused = 0

    def __call__(self, batch: Any, place_B: Any = None, prefix: Any = None) -> Any:
        if batch.ids_BT.numel() > self.most or not (self.with_prefix or prefix is None):
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory: injected")
        return super().__call__(batch, place_B, prefix)


def test_chunks_are_halved_where_memory_runs_out(runs: list[int]) -> None:
    model = build(tiny_config("opt"))
    plain, _ = _embed(model, share_prefix=False)
    encoder, done = Small(model, pooling="last", normalize=True), []
    encoder.most = 70
    vectors = embed_texts(
        encoder, tiny_tokenizer(), TEXTS, TEMPLATE, on_progress=done.append, say=pytest.fail
    )
    assert runs == [12]
    assert encoder.refused >= 2
    assert sum(done) == len(TEXTS)
    assert _apart(vectors, plain) < 1e-5


def test_no_memory_for_trying_it_out() -> None:
    model = build(tiny_config("opt"))
    plain, _ = _embed(model, share_prefix=False)
    encoder, said = Small(model, pooling="last", normalize=True), []
    encoder.with_prefix = False
    vectors = embed_texts(encoder, tiny_tokenizer(), TEXTS, TEMPLATE, say=said.append)
    assert encoder.refused == 1
    assert len(said) == 1
    assert "memory ran out" in said[0]
    assert _apart(vectors, plain) == 0


def test_by_default_a_refusal_is_a_warning() -> None:
    encoder = Encoder(build(_hybrid("mamba"), "eager"), pooling="last", normalize=True)
    with pytest.warns(UserWarning, match=r"12 tokens .* keeps no keys and values"):
        embed_texts(encoder, tiny_tokenizer(), TEXTS, TEMPLATE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed_texts(encoder, tiny_tokenizer(), TEXTS, TEMPLATE, share_prefix=False)


def test_the_reason_names_what_is_kept() -> None:
    with pytest.raises(NotShared, match=r"^Lfm2Model keeps a \w*Layer, not keys and values alone"):
        run_prefix(build(_hybrid("lfm2"), "eager"), torch.tensor([4, 5, 6]))
