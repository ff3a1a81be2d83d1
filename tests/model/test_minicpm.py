"""A translated MiniCPM checkpoint computes what MiniCPM's published formulas say.

The reference forward pass below is written from those formulas (modeling_minicpm.py of the
published checkpoints, arXiv 2404.06395) in plain torch float64, on the weights as saved.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoModel, AutoTokenizer
from transformers.models.granite import modeling_granite

from lowmem_cft.model.minicpm import (
    granite_config,
    is_minicpm,
    needs_translation,
    translate_checkpoint,
)

# openbmb/MiniCPM-2B-dpo-bf16's keys, small: it has neither model_type nor rope_theta,
# tie_word_embeddings or attention_bias.
CONFIG: dict[str, Any] = {
    "_name_or_path": "openbmb/CPM-2B",
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_minicpm.MiniCPMConfig",
        "AutoModel": "modeling_minicpm.MiniCPMModel",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.1,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 61,
    "scale_emb": 12,
    "dim_model_base": 8,
    "scale_depth": 1.4,
}

Weights = dict[str, Tensor]


def random_weights(config: dict[str, Any], seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv_size = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        sizes = {"q_proj": hidden, "k_proj": kv_size, "v_proj": kv_size, "o_proj": hidden}
        for name, size in sizes.items():
            shapes[f"{prefix}.self_attn.{name}.weight"] = (size, hidden)
            if config.get("attention_bias"):
                shapes[f"{prefix}.self_attn.{name}.bias"] = (size,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = {name: draw(*shape) * 0.3 for name, shape in shapes.items()}
    norms = [f"model.layers.{i}.input_layernorm" for i in range(config["num_hidden_layers"])]
    norms += [name.replace("input", "post_attention") for name in norms]
    weights |= {f"{name}.weight": 1 + draw(hidden) * 0.3 for name in [*norms, "model.norm"]}
    return weights


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotate(x: Tensor, config: dict[str, Any]) -> Tensor:
    """RoPE on (heads, positions, head_dim), with the float32 tables of the published code."""
    positions, dim = x.shape[-2:]
    base, scaling = config.get("rope_theta", 10000.0), config["rope_scaling"] or {}
    factor, limit = scaling.get("factor", 1.0), config["max_position_embeddings"]
    t = torch.arange(positions, dtype=torch.float32)
    if scaling.get("type") == "linear":
        t = t / factor
    if scaling.get("type") == "dynamic" and positions > limit:
        base = base * (factor * positions / limit - (factor - 1)) ** (dim / (dim - 2))
    angle = torch.outer(t, 1.0 / base ** (torch.arange(0, dim, 2).float() / dim))
    cos, sin = angle.cos().double(), angle.sin().double()
    left, right = x[..., : dim // 2], x[..., dim // 2 :]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def attention(x: Tensor, weights: Weights, prefix: str, config: dict[str, Any]) -> Tensor:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["hidden_size"] // heads

    def project(name: str, y: Tensor) -> Tensor:
        return y @ weights[f"{prefix}.{name}.weight"].T + weights.get(f"{prefix}.{name}.bias", 0.0)

    def split(y: Tensor, count: int) -> Tensor:
        return y.view(len(x), count, head_dim).transpose(0, 1)

    query = rotate(split(project("q_proj", x), heads), config)
    key = rotate(split(project("k_proj", x), kv_heads), config)
    value = split(project("v_proj", x), kv_heads)
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    mixed = []
    for head in range(heads):
        group = head * kv_heads // heads
        scores = (query[head] @ key[group].T / math.sqrt(head_dim)).masked_fill(future, -math.inf)
        mixed.append(scores.softmax(-1) @ value[group])
    return project("o_proj", torch.cat(mixed, dim=-1))


def reference(
    config: dict[str, Any], weights: Weights, ids: Tensor, layers: int | None = None
) -> Tensor:
    """The last hidden state of one text, after the first `layers` layers and the final norm."""
    depth, eps = config["num_hidden_layers"], config["rms_norm_eps"]
    residual_scale = config["scale_depth"] / math.sqrt(depth)
    h = weights["model.embed_tokens.weight"][ids] * config["scale_emb"]
    for layer in range(depth if layers is None else layers):
        prefix = f"model.layers.{layer}"
        x = rms_norm(h, weights[f"{prefix}.input_layernorm.weight"], eps)
        h = h + residual_scale * attention(x, weights, f"{prefix}.self_attn", config)
        x = rms_norm(h, weights[f"{prefix}.post_attention_layernorm.weight"], eps)
        gate, up, down = (
            weights[f"{prefix}.mlp.{name}_proj.weight"].T for name in ("gate", "up", "down")
        )
        h = h + residual_scale * ((silu(x @ gate) * (x @ up)) @ down)
    return rms_norm(h, weights["model.norm.weight"], eps)


def write_checkpoint(
    folder: Path, config: dict[str, Any], weights: Weights, form: str = "safetensors"
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if form == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        write_shards(folder, weights)
    for name in ("modeling_minicpm.py", "configuration_minicpm.py", "tokenization_minicpm.py"):
        (folder / name).write_text("raise SystemExit('remote code ran')\n")
    tokenizer_config = {
        "auto_map": {"AutoTokenizer": ["tokenization_minicpm.Tokenizer", None]},
        "trust_remote_code": True,
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "tokenizer.json").write_text(json.dumps(word_tokenizer()))
    (folder / "vocab.json").write_text('{"auto_map": 0}')
    (folder / "generation_config.json").write_text('{"custom_pipelines": {}, "bos_token_id": 1}')
    (folder / "README.md").write_text("card")
    return folder


def write_shards(folder: Path, weights: Weights) -> None:
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{part:05}-of-00002.safetensors"
        save_file({n: weights[n] for n in chosen}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def word_tokenizer() -> dict[str, Any]:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "small": 3, "model": 4}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }


def load(folder: Path, **changes: Any) -> Any:
    """The model as transformers loads it; no weight of its own making is allowed."""
    model: Any
    model, info = AutoModel.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True, trust_remote_code=False, **changes
    )
    assert type(model) is modeling_granite.GraniteModel
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model


def lift_norms(model: Any) -> None:
    """Granite's norm computes in float32 whatever the dtype; this makes it float64."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    norms: list[Any] = [
        m for m in model.modules() if isinstance(m, modeling_granite.GraniteRMSNorm)
    ]
    assert len(norms) == 2 * len(model.layers) + 1
    for norm in norms:
        norm.forward = MethodType(forward, norm)


@torch.no_grad()
def hidden(model: Any, ids: Tensor) -> Tensor:
    output: Tensor = model(input_ids=ids[None]).last_hidden_state[0]
    return output


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


IDS = torch.tensor([1, 17, 5, 60, 33, 5, 9, 41, 2, 28, 11])


def tree(folder: Path) -> Iterator[str]:
    return (str(file.relative_to(folder)) for file in sorted(folder.rglob("*")))


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"model_type": "minicpm", "rope_theta": 500.0, "tie_word_embeddings": False},
        {"attention_bias": True},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ],
    ids=["published", "no-gqa", "theta", "bias", "linear-rope"],
)
def test_translation_computes_the_published_formulas(
    tmp_path: Path, changes: dict[str, Any], form: str
) -> None:
    config = CONFIG | changes
    weights = random_weights(config)
    source = write_checkpoint(tmp_path / "source", config, weights, form)
    translate_checkpoint(source, tmp_path / "target")
    model = load(tmp_path / "target")
    wanted = reference(config, weights, IDS)
    assert distance(hidden(model, IDS), wanted) < 1e-6  # as loaded: float32 inside the norms
    lift_norms(model)
    assert distance(hidden(model, IDS), wanted) < 1e-10


def test_dynamic_rope_past_the_published_length(tmp_path: Path) -> None:
    scaling = {"type": "dynamic", "factor": 4.0}
    config = CONFIG | {"rope_scaling": scaling, "max_position_embeddings": 6}
    weights = random_weights(config)
    translate_checkpoint(write_checkpoint(tmp_path / "s", config, weights), tmp_path / "t")
    got = hidden(load(tmp_path / "t"), IDS)
    # transformers computes the stretched base in float32
    assert distance(got, reference(config, weights, IDS)) < 1e-5
    assert distance(got, reference(config | {"rope_scaling": None}, weights, IDS)) > 1e-2


@pytest.mark.parametrize(
    "ignored",
    [
        {"scale_emb": 1},
        {"scale_depth": math.sqrt(3)},  # a residual multiplier of 1
        {"rope_theta": 500.0},
        {"rms_norm_eps": 1e-2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_comparison_sees_each_setting(tmp_path: Path, ignored: dict[str, Any]) -> None:
    weights = random_weights(CONFIG)
    translate_checkpoint(write_checkpoint(tmp_path / "s", CONFIG, weights), tmp_path / "t")
    got = hidden(load(tmp_path / "t"), IDS)
    assert distance(got, reference(CONFIG | ignored, weights, IDS)) > 1e-4


def test_the_comparison_sees_the_attention_scale(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    translate_checkpoint(write_checkpoint(tmp_path / "s", CONFIG, weights), tmp_path / "t")
    unscaled = load(tmp_path / "t", attention_multiplier=1.0)
    assert distance(hidden(unscaled, IDS), reference(CONFIG, weights, IDS)) > 1e-2


def test_attention_scale_and_head_scale() -> None:
    published = CONFIG | {
        "hidden_size": 2304,
        "num_attention_heads": 36,
        "num_key_value_heads": 36,
        "num_hidden_layers": 40,
        "dim_model_base": 256,
    }
    translated = granite_config(published)
    assert translated["attention_multiplier"] == 1 / 8
    assert translated["logits_scaling"] == 9
    assert translated["embedding_multiplier"] == 12
    assert translated["residual_multiplier"] == pytest.approx(0.221359436)
    assert translated["tie_word_embeddings"] is True
    assert translated["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_dropped_layers_keep_the_published_residual_multiplier(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    translate_checkpoint(write_checkpoint(tmp_path / "s", CONFIG, weights), tmp_path / "t")
    model = load(tmp_path / "t", num_hidden_layers=2)
    lift_norms(model)
    got = hidden(model, IDS)
    assert distance(got, reference(CONFIG, weights, IDS, layers=2)) < 1e-10
    shallow = CONFIG | {"num_hidden_layers": 2}
    assert distance(got, reference(shallow, weights, IDS)) > 1e-2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "minicpm"}, True),
        ({"architectures": ["MiniCPMForCausalLM"]}, True),
        ({"model_type": "minicpm3", "architectures": ["MiniCPM3ForCausalLM"]}, False),
        ({"model_type": "minicpmv", "architectures": ["MiniCPMV"]}, False),
        ({"model_type": "llama", "architectures": ["MiniCPMForCausalLM"]}, False),
        ({"architectures": None}, False),
        ({}, False),
    ],
)
def test_is_minicpm(config: dict[str, Any], expected: bool) -> None:
    assert is_minicpm(config) is expected


def test_a_native_model_type_is_used_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.CONFIG_MAPPING", {"llama": None})
    assert needs_translation({"model_type": "minicpm"})
    assert not needs_translation({"model_type": "llama"})
    monkeypatch.setattr("transformers.CONFIG_MAPPING", {"minicpm": None})
    assert not needs_translation({"model_type": "minicpm"})
    # transformers chooses by model_type, which MiniCPM-2B's config.json lacks
    assert needs_translation(CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "minicpm3"}, r"model_type: got 'minicpm3', wanted 'minicpm'"),
        ({"hidden_act": "relu"}, r"hidden_act: got 'relu', wanted 'silu'"),
        ({"num_experts": 8}, r"num_experts: got 8"),
        ({"is_causal": False}, r"is_causal: got False"),
        ({"sparse_config": {"topk": 64}}, r"sparse_config: got \{"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config: got \{"),
        ({"head_dim": 16}, r"head_dim: got 16, wanted .* = 8"),
        ({"hidden_size": 30}, r"hidden_size: got 30, wanted a multiple of .* = 4"),
        ({"num_key_value_heads": 3}, r"num_attention_heads: got 4, wanted a multiple .* = 3"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads: got 0, wanted a positive number"),
        ({"rope_theta": None}, r"rope_theta: got None, wanted a positive number"),
        ({"rope_scaling": {"type": "longrope"}}, r"rope_scaling: got 'longrope', wanted"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling.factor: got None"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1}}, r"no \['alpha'\]"),
        ({"scale_depth": "1.4"}, r"scale_depth: got '1.4', wanted a positive number"),
    ],
)
def test_what_does_not_translate_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        granite_config(CONFIG | changes)


@pytest.mark.parametrize("key", ["scale_emb", "scale_depth", "dim_model_base", "hidden_size"])
def test_a_missing_key_is_named(key: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != key}
    with pytest.raises(ValueError, match=f"{key}: got None, wanted a positive number"):
        granite_config(config)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", CONFIG, random_weights(CONFIG))


def test_no_code_comes_along(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    translate_checkpoint(source, target)
    assert list(tree(target)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((target / name).read_text())
        assert not {"auto_map", "custom_pipelines", "trust_remote_code"} & set(content)
    assert json.loads((target / "vocab.json").read_text()) == {"auto_map": 0}
    assert "auto_map" in (source / "tokenizer_config.json").read_text()
    assert AutoTokenizer.from_pretrained(target)("small model").input_ids == [3, 4]


def test_an_untied_head_in_the_file_is_left_out(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    head = {"lm_head.weight": torch.ones(61, 32, dtype=torch.float64)}
    translate_checkpoint(write_checkpoint(tmp_path / "s", CONFIG, weights | head), tmp_path / "t")
    got = hidden(load(tmp_path / "t"), IDS)
    assert distance(got, reference(CONFIG, weights, IDS)) < 1e-6


def test_weights_are_hard_links_into_a_hub_snapshot(source: Path, tmp_path: Path) -> None:
    """A hub snapshot holds relative links to blobs, and those must not be copied as links."""
    blob = tmp_path / "blobs" / "0a1b"
    blob.parent.mkdir()
    (source / "model.safetensors").rename(blob)
    (source / "model.safetensors").symlink_to(os.path.relpath(blob, source))
    target = tmp_path / "elsewhere" / "deep" / "target"
    translate_checkpoint(source, target)
    assert (target / "model.safetensors").samefile(blob)
    assert not (target / "model.safetensors").is_symlink()


@pytest.mark.parametrize("symlinks", [True, False])
def test_without_hard_links(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, symlinks: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not on this file system")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    if not symlinks:
        monkeypatch.setattr(Path, "symlink_to", refuse)
    target = tmp_path / "target"
    translate_checkpoint(source, target)
    assert (target / "model.safetensors").is_symlink() is symlinks
    same = (target / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()
    assert same
    assert (
        distance(hidden(load(target), IDS), reference(CONFIG, random_weights(CONFIG), IDS)) < 1e-6
    )


def test_interrupted_translation_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr("lowmem_cft.model.minicpm.write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            translate_checkpoint(source, target)
    assert not list(tmp_path.glob("target*"))
    translate_checkpoint(source, target)
    assert [path.name for path in tmp_path.glob("target*")] == ["target"]


def test_a_complete_target_is_left_alone(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    translate_checkpoint(source, target)
    times = {file.name: file.stat().st_mtime_ns for file in target.iterdir()}
    translate_checkpoint(source, target)
    assert {file.name: file.stat().st_mtime_ns for file in target.iterdir()} == times


@pytest.mark.parametrize("change", ["configuration", "weights", "link", "nothing"])
def test_a_target_that_is_another_is_replaced(source: Path, tmp_path: Path, change: str) -> None:
    target = tmp_path / "target"
    translate_checkpoint(source, target)
    (target / "mark").touch()
    if change == "configuration":
        (source / "config.json").write_text(json.dumps(CONFIG | {"scale_emb": 10}))
    if change in ("weights", "link"):
        (target / "model.safetensors").unlink()
    if change == "link":
        (target / "model.safetensors").symlink_to(tmp_path / "an emptied cache")
    translate_checkpoint(source, target)
    assert (target / "mark").exists() == (change == "nothing")
    scale = 10 if change == "configuration" else CONFIG["scale_emb"]
    assert json.loads((target / "config.json").read_text())["embedding_multiplier"] == scale
    assert (target / "model.safetensors").samefile(source / "model.safetensors")


def test_missing_weights_are_named(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights: wanted \*.safetensors or pytorch"):
        translate_checkpoint(source, tmp_path / "target")
    write_shards(source, random_weights(CONFIG))
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"not there: .*model-00002-of-00002"):
        translate_checkpoint(source, tmp_path / "target")
    assert not list(tmp_path.glob("target*"))
