"""Every supported family: 4-bit loading, the adapter, padding and batch invariance, errors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowmem_cft.data.chunks import pad
from lowmem_cft.data.tokens import TextFormat, tokenize
from lowmem_cft.inference.embed import embed_texts
from lowmem_cft.model import sources
from lowmem_cft.model.adapter import attach_adapter, target_modules, trainable_parameters
from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.model.dropout import DropoutClock, IdentityDropout
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.recipe.schema import LoraSection, ModelSection
from tiny import FAMILIES, SIZES, save_tiny, tiny_config, tiny_tokenizer

CPU = torch.device("cpu")
TEXTS = [
    "the cat sat on the mat .",
    "a dog ran",
    "two big red house in the rain and sun over three small blue tree",
    "sad",
]
FORMAT = TextFormat("{text}", append_eos=True, max_tokens=32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: save_tiny(root / family, family) for family in FAMILIES}


def load(folder: Path, **values: Any) -> Any:
    return load_backbone(ModelSection(id=str(folder), **values), CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_loads_and_trains_every_lora_weight(folders: dict[str, Path], family: str) -> None:
    backbone = load(folders[family], dtype="fp32")
    embedding = backbone.model.get_input_embeddings().weight
    linear = {type(m).__name__ for m in backbone.model.modules() if "Linear" in type(m).__name__}
    assert linear == {"Linear4bit"}
    assert not any(p.requires_grad for p in backbone.model.parameters())
    num_targets = len(target_modules(backbone.model, "all-linear"))
    model = attach_adapter(backbone.model, LoraSection(rank=4), DropoutClock(), seed=0)
    assert embedding.dtype == torch.float32
    encoder = Encoder(model, pooling="eos", normalize=False)
    store = tokenize(backbone.tokenizer, TEXTS, FORMAT)
    batch = pad(store, np.arange(len(TEXTS)), backbone.tokenizer.pad_token_id)
    parameters = trainable_parameters(model)
    assert len(parameters) == 2 * num_targets
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    # B starts at zero, so A's gradient is zero in the first step and must not be in the second.
    for _ in range(2):
        optimizer.zero_grad()
        with encoder.training_mode(step=0):
            encoder(batch).square().sum().backward()
        optimizer.step()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in zip(names, parameters, strict=True):
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_table_is_never_upcast(folders: dict[str, Path], family: str) -> None:
    backbone = load(folders[family], dtype="bf16")
    model = attach_adapter(backbone.model, LoraSection(rank=4), DropoutClock(), seed=0)
    assert backbone.model.get_input_embeddings().weight.dtype == torch.bfloat16
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16, torch.uint8}
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("pooling", ["eos", "mean", "weighted-mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_side_and_company_change_nothing(
    folders: dict[str, Path], family: str, pooling: Any
) -> None:
    backbone = load(folders[family], dtype="fp32")
    encoder = Encoder(backbone.model, pooling=pooling, normalize=True)
    store = tokenize(backbone.tokenizer, TEXTS, FORMAT)
    pad_id = backbone.tokenizer.pad_token_id
    everything = np.arange(len(TEXTS))
    with torch.no_grad():
        right = encoder(pad(store, everything, pad_id))
        left = encoder(pad(store, everything, pad_id, side="left"))
        alone = torch.cat([encoder(pad(store, everything[i : i + 1], pad_id)) for i in everything])
    assert float(right.std(dim=0).max()) > 1e-3, "the texts embed alike: nothing is compared"
    assert float((right - left).abs().max()) < 1e-5
    assert float((right - alone).abs().max()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_is_read_at_the_appended_token(folders: dict[str, Path], family: str) -> None:
    backbone = load(folders[family], dtype="fp32", quantization="none")
    tokenizer, eos = backbone.tokenizer, backbone.tokenizer.eos_token_id
    encoder = Encoder(backbone.model, pooling="eos", normalize=False)
    vector = torch.from_numpy(embed_texts(encoder, tokenizer, TEXTS[:1], FORMAT))
    ids = [*tokenizer(TEXTS[0])["input_ids"], eos]
    with torch.no_grad():
        hidden = backbone.model(input_ids=torch.tensor([ids])).last_hidden_state
    assert float((vector - hidden[:, -1]).abs().max()) < 1e-5
    assert float((vector - hidden[:, -2]).abs().max()) > 1e-3


def test_identical_texts_are_encoded_once(tiny_folder: Path) -> None:
    backbone = load(tiny_folder, dtype="fp32")
    encoder = Encoder(backbone.model, pooling="eos", normalize=True)
    seen: list[int] = []
    texts = [TEXTS[1], TEXTS[0], TEXTS[1]]
    vectors = embed_texts(encoder, backbone.tokenizer, texts, FORMAT, on_progress=seen.append)
    assert sum(seen) == 2
    assert np.array_equal(vectors[0], vectors[2])
    assert not np.allclose(vectors[0], vectors[1])


def test_keep_layers_equals_the_lower_layers(tiny_folder: Path) -> None:
    whole = load(tiny_folder, dtype="fp32", quantization="none")
    cut = load(tiny_folder, dtype="fp32", quantization="none", keep_layers=2)
    ids = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        states = whole.model(input_ids=ids, output_hidden_states=True).hidden_states
        wanted = whole.model.norm(states[2])
        got = cut.model(input_ids=ids).last_hidden_state
    assert len(cut.model.layers) == 2
    assert torch.equal(got, wanted)
    assert cut.config_kwargs["num_hidden_layers"] == 2


def test_base_dropout_is_off(tmp_path: Path) -> None:
    config = tiny_config("opt")
    assert config.dropout > 0, "OPT's configuration has dropout: nothing is tested otherwise"
    backbone = load(save_tiny(tmp_path / "opt", "opt"), dtype="fp32", quantization="none")
    backbone.model.train()
    ids = torch.tensor([[5, 6, 7, 2]])
    first, second = (backbone.model(input_ids=ids).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (
            "all-linear",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
    ],
    ids=["all-linear", "attention", "mlp", "names"],
)
def test_targets(tiny_folder: Path, targets: Any, wanted: set[str]) -> None:
    model = load(tiny_folder).model
    names = target_modules(model, targets)
    assert {name.rpartition(".")[2] for name in names} == wanted
    assert len(names) == len(wanted) * SIZES["num_hidden_layers"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["attention", "mlp"])
def test_presets_of_targets_exist_in_every_family(
    folders: dict[str, Path], family: str, targets: str
) -> None:
    model = load(folders[family]).model
    chosen = target_modules(model, targets)
    assert 0 < len(chosen) < len(target_modules(model, "all-linear"))


def test_unknown_target_lists_those_there(tiny_folder: Path) -> None:
    model = load(tiny_folder).model
    with pytest.raises(ValueError, match=r"got 'q_prj'.*down_proj, gate_proj.*q_proj"):
        target_modules(model, ["q_prj"])


def test_dropout_modules_are_ours_and_named_apart(tiny_folder: Path) -> None:
    model = attach_adapter(
        load(tiny_folder).model, LoraSection(rank=2, dropout=0.1), DropoutClock(), seed=0
    )
    ours = [m for m in model.modules() if isinstance(m, IdentityDropout)]
    assert len(ours) == 7 * SIZES["num_hidden_layers"]
    assert len({m.module_key for m in ours}) == len(ours)
    assert not any(type(m) is torch.nn.Dropout and m.p for m in model.modules())


def test_same_seed_same_adapter(tiny_folder: Path) -> None:
    section = LoraSection(rank=2, init="gaussian")
    states = [
        attach_adapter(load(tiny_folder).model, section, DropoutClock(), seed=seed).state_dict()
        for seed in (1, 1, 2)
    ]
    keys = [key for key in states[0] if "lora_A" in key]
    assert keys
    assert all(torch.equal(states[0][key], states[1][key]) for key in keys)
    assert not any(torch.equal(states[0][key], states[2][key]) for key in keys)


def test_no_tokenizer(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_folder / name, tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer that transformers can load"):
        load(tmp_path)


def test_too_many_layers(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_layers: got 9, but .* has 3 layers"):
        load(tiny_folder, keep_layers=9)


def test_lacking_weights_are_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"lacks 1 weights \(layers.1.mlp.up_proj.weight"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such folder"),
        ("nowhere.gguf", "no such file"),
        ("someone/no-such-model", "hub"),
    ],
    ids=["folder", "gguf", "hub"],
)
def test_unknown_model(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sources.resolve(name, None)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config.json"):
        sources.resolve(str(tmp_path), None)


def test_minicpm_folder_is_translated(tmp_path: Path) -> None:
    """A MiniCPM checkpoint loads as Granite, and keeping fewer layers keeps their scale."""
    import json

    folder = save_tiny(tmp_path / "minicpm", "minicpm")
    config = json.loads((folder / "config.json").read_text())
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    published = {
        key: config[key]
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    } | {
        "architectures": ["MiniCPMForCausalLM"],
        "auto_map": {"AutoModel": "modeling_minicpm.MiniCPMModel"},
        "num_attention_heads": heads,
        "num_key_value_heads": config["num_key_value_heads"],
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "rms_norm_eps": config["rms_norm_eps"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 16,
    }
    wanted = load(folder, dtype="fp32", quantization="none")
    (folder / "config.json").write_text(json.dumps(published))
    got = load(folder, dtype="fp32", quantization="none")
    cut = load(folder, dtype="fp32", quantization="none", keep_layers=2)
    assert type(got.model).__name__ == "GraniteModel"
    assert cut.model.config.residual_multiplier == pytest.approx(1.4 / layers**0.5)
    ids = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        a, b = (m.model(input_ids=ids).last_hidden_state for m in (wanted, got))
    assert torch.allclose(a, b, atol=1e-6)


def test_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF file written here loads with the weights that went into it."""
    gguf = pytest.importorskip("gguf")
    from transformers import AutoModel

    config = tiny_config("llama")
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    path = tmp_path / "tiny.gguf"
    write_gguf(gguf, path, config, model)
    said: list[str] = []
    folder = sources.resolve(str(path), None, said.append)
    assert any("converting" in text for text in said)
    said.clear()
    assert sources.resolve(str(path), None, said.append) == folder
    assert not said, "converted again"
    backbone = load(path, dtype="fp32", quantization="none")
    ids = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        wanted = model(input_ids=ids).last_hidden_state
        got = backbone.model(input_ids=ids).last_hidden_state
    assert torch.allclose(got, wanted, atol=1e-5)


def write_gguf(gguf: Any, path: Path, config: Any, model: Any) -> None:
    """A llama GGUF in float32 with the tiny model's weights and a byte-level vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = ["<unk>", "<s>", "</s>", "<pad>", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd"]
    words += [f"t{i}" for i in range(config.vocab_size - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3] * 4 + [1] * (len(words) - 4))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        array = tensor.numpy()
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            if part.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if "q_proj" in part else 2
                # llama.cpp interleaves the halves that rotary embeddings pair
                array = (
                    array.reshape(heads, 2, array.shape[0] // heads // 2, -1)
                    .swapaxes(1, 2)
                    .reshape(array.shape)
                )
            target = f"blk.{layer}.{names[part]}.weight"
        else:
            target = f"{names[stem]}.weight"
        writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_tiny_tokenizer_knows_its_words() -> None:
    """The other tests would compare unknown tokens with each other otherwise."""
    ids = tiny_tokenizer()(TEXTS)["input_ids"]
    assert 0 not in [i for row in ids for i in row]
