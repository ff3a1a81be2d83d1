"""What a recipe names as its model becomes a folder or hub id, or an error that says how to go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowmem_cft.model import sources
from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.recipe.schema import ModelSection
from tiny import save_tiny, tiny_config

CPU = torch.device("cpu")


def load(folder: Path, **values: Any) -> Any:
    return load_backbone(ModelSection(id=str(folder), **values), CPU)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "does not exist"),
        ("nowhere.gguf", "does not exist"),
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


@pytest.fixture
def run_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """What a run leaves of its adapter."""
    from lowmem_cft.model.adapter import attach_adapter
    from lowmem_cft.model.dropout import DropoutClock
    from lowmem_cft.recipe.schema import LoraSection

    run = tmp_path / "runs" / "tiny"
    model = load(tiny_folder, quantization="none").model
    attach_adapter(model, LoraSection(), DropoutClock(), seed=0).save_pretrained(run / "adapter")
    (run / "recipe.yaml").write_text(
        f"model: {{id: {tiny_folder}}}\ndata: {{sources: [{{path: demo}}]}}\n"
    )
    return run


@pytest.mark.parametrize("part", ["", "adapter"])
def test_a_run_is_no_model(run_folder: Path, part: str) -> None:
    with pytest.raises(ValueError, match=r"lowmem-cft export .*tiny --merged --out FOLDER`"):
        sources.resolve(str(run_folder / part), None)


def test_an_adapter_is_no_model(
    run_folder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way out that the message names is followed here."""
    import re

    folder = (run_folder / "adapter").rename(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is an adapter, not a model") as refused:
        sources.resolve(str(folder), None)
    (code,) = re.findall(r"`(.*)`", str(refused.value))
    monkeypatch.chdir(tmp_path)
    exec(code)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "FOLDER" / name).write_bytes((tiny_folder / name).read_bytes())
    assert load(tmp_path / "FOLDER", quantization="none").model.config.model_type == "llama"


def test_an_adapter_on_the_hub_is_no_model(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def download(model_id: str, name: str, **options: Any) -> str:
        if not (file := run_folder / "adapter" / name).is_file():
            raise EntryNotFoundError(name)
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ValueError, match=r"someone/lora is an adapter, not a model"):
        sources.resolve("someone/lora", None)


def test_a_hub_that_does_not_answer_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The libraries retry every file, each for half a minute; their cache is looked in at once."""
    import socket

    from huggingface_hub import constants

    asked: list[Any] = []

    def unreachable(*address: Any, **options: Any) -> None:
        asked.append(address)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    said: list[str] = []
    with pytest.raises(ValueError, match=r"someone/no-such-model .* the hub cannot be reached"):
        sources.resolve("someone/no-such-model", None, said.append)
    assert len(asked) == 1
    assert "the hub cannot be reached: looking in its cache only" in said
    assert not capfd.readouterr().err, "a library says something of its own"
