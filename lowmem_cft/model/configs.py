"""The base model's configuration: from the model itself, or from its name alone for planning."""

from __future__ import annotations

import inspect
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

from lowmem_cft.files import read_json
from lowmem_cft.model import minicpm
from lowmem_cft.model.bounds import num_ids
from lowmem_cft.model.quantized import own_skipped_modules
from lowmem_cft.model.sources import may_be_on_hub, use_cache_without_hub
from lowmem_cft.recipe.schema import ModelSection

_JITTER = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
"""What layers with experts call the noise that their routers draw in training. A router's own
`router_jitter_noise` is not among them: PhiMoE chooses experts by it in evaluation, too."""

GET_MODEL = "download, export or train the model again"
"""The way out where a file of a model is damaged."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_config(section: ModelSection, name: str) -> tuple[Any, dict[str, Any]]:
    """The base model's configuration: dropout off, top layers dropped as the recipe says.

    Also what another loader has to set in it to get the same model.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            name, revision=section.revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.id: {section.id}: this transformers ({transformers.__version__}) cannot load "
            f"its configuration without remote code: {first_line(error)}"
        ) from error
    return _prepared(config, section)


def config_without_weights(section: ModelSection) -> Any:
    """The configuration, as `load_config` gives it, of a model that need not be at hand.

    Models of the shipped recipes are known by their shapes; a folder, a GGUF file or a model on
    the hub gives its configuration and nothing more is read.

    Raises:
        ValueError: none of these has a configuration.
    """
    known = json.loads((resources.files("lowmem_cft") / "model" / "known_configs.json").read_text())
    if section.id in known:
        return _prepared(_from_values(known[section.id]), section)[0]
    path = Path(section.id).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        values = read_json(path / "config.json", GET_MODEL)
        if minicpm.needs_translation(values):
            return _prepared(_from_values(values), section)[0]
    if path.suffix == ".gguf":
        return _from_gguf(path, section)
    if may_be_on_hub(section.id):
        use_cache_without_hub(section.id, section.revision)
    return load_config(section, section.id)[0]


def _from_values(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if minicpm.needs_translation(values):
        values = minicpm.granite_config(values)
    others = {key: value for key, value in values.items() if key != "model_type"}
    return AutoConfig.for_model(values["model_type"], **others)


def _from_gguf(path: Path, section: ModelSection) -> Any:
    from transformers import AutoConfig

    if not path.is_file():
        raise ValueError(f"model.id: no such file: {path}")
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    return _prepared(config, section)[0]


def _prepared(config: Any, section: ModelSection) -> tuple[Any, dict[str, Any]]:
    """Dropout off, top layers dropped as the recipe says; what changed besides dropout.

    Raises:
        ValueError: the model is an encoder-decoder, or has fewer layers.
    """
    if config.is_encoder_decoder:
        raise ValueError(
            f"model.id: {section.id} is an encoder-decoder ({config.model_type}), whose encoder and "
            "decoder read different texts; name a decoder, such as Qwen/Qwen3-0.6B, or an encoder, "
            "such as BAAI/bge-base-en-v1.5"
        )
    disable_base_dropout(config)
    if getattr(config, "router_jitter_noise", 0):  # random in training, as dropout is
        config.router_jitter_noise = 0.0
    changed = own_skipped_modules(config)
    rows, pad = num_ids(config), getattr(config, "pad_token_id", None)
    if rows is not None and pad is not None and pad >= rows:
        changed["pad_token_id"] = None  # no model is built with a padding row that it has not
    if section.keep_layers is not None:
        layers = config.get_text_config().num_hidden_layers
        if section.keep_layers > layers:
            raise ValueError(
                f"model.keep_layers: got {section.keep_layers}, but {section.id} has {layers} layers"
            )
        changed |= _shortened(config, section.keep_layers)
    for key, value in changed.items():
        setattr(config, key, value)
    return config, changed


def disable_base_dropout(config: Any) -> None:
    """Set every dropout rate of a base model's configuration, its parts' included, to 0.

    A frozen base gains nothing from its own dropout, and its masks would depend on the chunking.
    """
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_json_string"):  # a configuration of its own
            disable_base_dropout(value)
        elif _is_dropout_rate(key, value):
            setattr(config, key, type(value)(0))  # some fields take no float


def disable_layer_dropout(model: Any) -> None:
    """Set every dropout rate, and all noise of training, in a base model's layers to 0.

    Not all of them come from the configuration. The adapter's own must not be in the model yet.
    """
    for module in model.modules():
        is_dropout = "drop" in type(module).__name__.lower()
        for name, value in list(vars(module).items()):
            is_rate = _is_dropout_rate("drop" if is_dropout and name == "p" else name, value)
            if is_rate or (name in _JITTER and value):
                setattr(module, name, 0.0)


def _is_dropout_rate(name: str, value: Any) -> bool:
    """Whether a number is the rate of some dropout, of layers and paths included, and not 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "drop" in name.lower() and is_number and 0 < value <= 1


def base_model_kwargs(config: Any) -> dict[str, Any]:
    """What `AutoModel` is given besides: no pooler, whose output is not read.

    BERT's would be adapted and never trained, and many checkpoints have none.
    """
    from transformers import MODEL_MAPPING

    classes = MODEL_MAPPING.get(type(config), None)
    base_class = classes[0] if isinstance(classes, tuple) else classes
    takes = inspect.signature(base_class.__init__).parameters if base_class else {}
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}


def _shortened(config: Any, layers: int) -> dict[str, Any]:
    """What changes in the configuration of a model that keeps only its lowest layers."""
    changed: dict[str, Any] = {"num_hidden_layers": layers}
    if getattr(config, "layer_types", None):
        changed["layer_types"] = list(config.layer_types[:layers])
    if (scale := getattr(config, "scale_depth", None)) is not None:
        # MiniCPM scales residuals by scale_depth / sqrt(layers); the kept ones keep their scale.
        changed["scale_depth"] = scale * math.sqrt(layers / config.num_hidden_layers)
    return changed
