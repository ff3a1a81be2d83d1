"""MiniCPM checkpoints, read as the Granite architecture of transformers.

The checkpoints of the MiniCPM-2B and MiniCPM-1B families come with their own model code, which
this project does not run. None is needed: with the formulas of MiniCPM's published
modeling_minicpm.py and of its paper (arXiv 2404.06395), a dense MiniCPM is a Llama with

    h0   = scale_emb * embedding(ids)
    h   += scale_depth / sqrt(num_hidden_layers) * block(norm(h))    attention, then MLP
    attn = softmax(q k^T / sqrt(head_dim)) v
    logits = lm_head(h / (hidden_size / dim_model_base))

and `GraniteModel` computes those with its four multipliers, under the same weight names. So only
config.json is translated; the weights are used as they lie.

The residual multiplier is a number of the published depth. Granite stores the number itself, so
dropping layers after the translation leaves it alone; dropping them before would not.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_cft.files import read_json, whole_folder, write_json

MODEL_TYPE = "minicpm"
ARCHITECTURE = "MiniCPMForCausalLM"

# The published class defaults the three scales to 1, which is no released model: a config.json
# without them is more likely damaged than plain, so they are asked for.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "scale_emb",
    "scale_depth",
    "dim_model_base",
)

# Same meaning in both architectures. The values are the published class defaults: several
# released config.json files leave these keys out, and Granite's own defaults differ.
_COPIED: Mapping[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Keys of MiniCPM's relatives that change the computation or the weights, each with the values
# that leave it as above.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "num_experts": (None, 0),
    "is_causal": (None, True),
    "sparse_config": (None,),
    "mixer_types": (None,),
    "attention_type": (None, "vanilla"),
    "ffn_type": (None, "vanilla"),
    "quantization_config": (None,),
}

_ROPE_TYPES = ("default", "linear", "dynamic")
_ROPE_THETA = 10000.0  # the published class default, left out of MiniCPM-2B's config.json

_CONFIG_NAME = "config.json"
# Tried in this order, as from_pretrained does; a second format would only be a second copy.
_WEIGHTS = (
    ("*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
_COMPANIONS = (
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
_WAY_OUT = "download the model again"
_REMOTE_CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")


def is_minicpm(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a MiniCPM (not its relatives MiniCPM3 and MiniCPM-V).

    The model type usually lives in the published configuration class only: the config.json of
    MiniCPM-2B names the architecture and has no `model_type`.
    """
    model_type = config.get("model_type")
    if model_type is None:
        return ARCHITECTURE in (config.get("architectures") or ())
    return bool(model_type == MODEL_TYPE)


def needs_translation(config: Mapping[str, Any]) -> bool:
    """Whether `config` is a MiniCPM that the installed transformers cannot load by itself.

    A native model type is chosen by `model_type`, so a config.json without that key needs the
    translation whatever the version.
    """
    if not is_minicpm(config):
        return False
    from transformers import CONFIG_MAPPING

    return config.get("model_type") is None or MODEL_TYPE not in CONFIG_MAPPING


def granite_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the `GraniteModel` that computes what this MiniCPM computes.

    Args:
        config: the published one, at its full depth.

    Raises:
        ValueError: a key has no translation; the message names it.
    """
    _check_translatable(config)
    heads = config["num_attention_heads"]
    head_dim = _exact_quotient(config, "hidden_size", "num_attention_heads")
    if config.get("head_dim") not in (None, head_dim):
        raise _wrong("head_dim", config["head_dim"], f"hidden_size / heads = {head_dim}")
    kv_heads = config.get("num_key_value_heads")
    if kv_heads is None:
        kv_heads = heads
    else:
        _exact_quotient(config, "num_attention_heads", "num_key_value_heads")
    translated: dict[str, Any] = {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "hidden_act": "silu",
        "mlp_bias": False,
        "num_key_value_heads": kv_heads,
        "rope_parameters": _rope_parameters(config),
        "embedding_multiplier": config["scale_emb"],
        "residual_multiplier": config["scale_depth"] / math.sqrt(config["num_hidden_layers"]),
        "attention_multiplier": 1 / math.sqrt(head_dim),
        "logits_scaling": config["hidden_size"] / config["dim_model_base"],
    }
    scales = ("scale_emb", "scale_depth", "dim_model_base")
    translated |= {key: config[key] for key in _REQUIRED if key not in scales}
    translated |= {key: config.get(key, default) for key, default in _COPIED.items()}
    dtype = config.get("dtype", config.get("torch_dtype"))
    return translated if dtype is None else translated | {"dtype": dtype}


def translate_checkpoint(source: Path, target: Path) -> None:
    """Write to `target` the MiniCPM checkpoint folder `source` as a Granite checkpoint folder.

    The weight files are hard links to those of `source` where the file system can, so they cost
    no disk and must not be written in place. No code file is taken along. A `target` that
    appears is complete; one that is this translation already is left alone, any other is replaced.

    Raises:
        ValueError: a file is damaged, or the configuration has no translation.
        FileNotFoundError: there are no weights, or not all.
    """
    config = granite_config(read_json(source / _CONFIG_NAME, _WAY_OUT))
    files = _weight_files(source) + _companion_files(source)
    if _is_translation(target, config, files):
        return
    with whole_folder(target) as partial:
        for file in files:
            _place(file, partial / file.name)
        write_json(partial / _CONFIG_NAME, config)


def _wrong(key: str, got: object, wanted: str) -> ValueError:
    return ValueError(f"MiniCPM config.json: {key}: got {got!r}, wanted {wanted}")


def _check_translatable(config: Mapping[str, Any]) -> None:
    if not is_minicpm(config):
        raise _wrong("model_type", config.get("model_type"), repr(MODEL_TYPE))
    for key in _REQUIRED:
        _positive(key, config.get(key))
    for key, allowed in _ONLY.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise _wrong(key, value, " or ".join(repr(choice) for choice in allowed))


def _positive(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise _wrong(key, value, "a positive number")
    return value


def _exact_quotient(config: Mapping[str, Any], key: str, divisor_key: str) -> int:
    divisor = _positive(divisor_key, config[divisor_key])
    quotient, remainder = divmod(config[key], divisor)
    if remainder:
        raise _wrong(key, config[key], f"a multiple of {divisor_key} = {divisor}")
    return int(quotient)


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings under the names of transformers 5, which are one dict.

    The published code has linear and dynamic scaling besides none, each by a `factor` alone, and
    transformers computes both alike; anything more in the dict is a scaling it does not have.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = dict(config.get(key) or {})
    old_name = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", old_name)
    theta = scaling.pop("rope_theta", config.get("rope_theta", _ROPE_THETA))
    parameters = {"rope_type": kind, "rope_theta": _positive("rope_theta", theta)}
    if kind not in _ROPE_TYPES:
        raise _wrong(key, kind, f"a type of {', '.join(_ROPE_TYPES)}")
    if kind != "default":
        parameters["factor"] = _positive(f"{key}.factor", scaling.pop("factor", None))
    if scaling:
        raise _wrong(key, config[key], f"nothing but a type and a factor (no {sorted(scaling)})")
    return parameters


def _weight_files(source: Path) -> list[Path]:
    """The files of the first weight format that `source` has, the index among them."""
    for pattern, index_name in _WEIGHTS:
        files = sorted(source.glob(pattern))
        index = source / index_name
        if index.exists():
            _check_shards(index, {file.name for file in files})
            files.append(index)
        if files:
            return files
    patterns = " or ".join(pattern for pattern, _ in _WEIGHTS)
    raise FileNotFoundError(f"{source}: no weights: wanted {patterns}")


def _check_shards(index: Path, present: set[str]) -> None:
    names = read_json(index, _WAY_OUT, "weight_map")["weight_map"].values()
    missing = sorted(set(names) - present)
    if missing:
        raise FileNotFoundError(f"{index}: names weight files that are not there: {missing}")


def _companion_files(source: Path) -> list[Path]:
    """Tokenizer and generation files, by name: a list of what to leave out would let code in."""
    files = {file for pattern in _COMPANIONS for file in source.glob(pattern)}
    return sorted(file for file in files if file.is_file() and file.suffix != ".py")


def _place(source: Path, target: Path) -> None:
    # only the *_config.json files can name code; in a vocabulary the same key is a token
    if source.name.endswith("_config.json"):
        content = read_json(source, _WAY_OUT)
        write_json(target, {k: v for k, v in content.items() if k not in _REMOTE_CODE_KEYS})
    else:
        _link(source.resolve(strict=True), target)


def _link(source: Path, target: Path) -> None:
    """`source`'s content at `target`: a hard link, else a symbolic link, else a copy.

    `source` is absolute and no link itself: hub snapshots hold relative links, and a hard link
    to one of those would dangle.
    """
    for link in (target.hardlink_to, target.symlink_to):
        try:
            link(source)
        except (OSError, NotImplementedError):  # another file system, or one without links
            continue
        return
    shutil.copyfile(source, target)


def _is_translation(target: Path, config: Mapping[str, Any], files: list[Path]) -> bool:
    # exists() follows links, so one into a cache that was emptied counts as missing
    names = [_CONFIG_NAME, *(file.name for file in files)]
    if not all((target / name).exists() for name in names):
        return False
    return read_json(target / _CONFIG_NAME, "remove the folder") == config
