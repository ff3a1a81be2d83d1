"""The frozen backbone, 4-bit or not, and the adapter on it.

The base model is loaded without its LM head, its own dropout is off, its embedding table and norms
keep their dtype (nothing is upcast), and only the adapter's float32 weights are trained.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem_cft.files import read_json
from lowmem_cft.model import sources
from lowmem_cft.model.configs import GET_MODEL, first_line, load_config
from lowmem_cft.model.dropout import DropoutClock, IdentityDropout
from lowmem_cft.model.lora import use_lean_layers
from lowmem_cft.recipe.schema import LoraSection, ModelSection

Tokenizer = Any  # transformers' PreTrainedTokenizerBase, which ships no types

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Backbone:
    """A loaded base model.

    `name`: what adapter_config.json names as its base: a hub id or folder that loads as it is.
    `loader_kwargs`, `config_kwargs`: what `AutoModel.from_pretrained` needs besides the name, as
    JSON values, to give the same model again.
    """

    model: Any
    tokenizer: Tokenizer
    name: str
    dtype: torch.dtype
    loader_kwargs: dict[str, Any]
    config_kwargs: dict[str, Any]


def choose_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The recipe's compute dtype; auto takes bf16 where the device multiplies fast in it.

    A CPU without bf16 instructions is several times slower in it than in float32; a GPU before
    Ampere has float16 only.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and notices off the console; errors still show."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("huggingface_hub", "sentence_transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Its notice that an optional faster CPU kernel is absent reads like a failure.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


def load_tokenizer(name: str, revision: str | None) -> Tokenizer:
    """The model's fast tokenizer, with a padding token.

    Raises:
        ValueError: the model has none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, use_fast=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model.id: {name} has no tokenizer that transformers can load ({first_line(error)}); "
            "put its tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
    if not len(tokenizer):
        raise ValueError(f"model.id: the tokenizer of {name} is empty")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def quantization_kwargs(section: ModelSection, dtype: torch.dtype) -> dict[str, Any]:
    """BitsAndBytesConfig fields of the recipe, as JSON values; empty if not quantized."""
    if section.quantization == "none":
        return {}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": section.double_quantization,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
    }


@dataclass(frozen=True)
class BackboneSource:
    """A base model found, with all of it that is small.

    `name`: see `Backbone`. `revision`: of a hub id, None for a folder.
    """

    name: str
    revision: str | None
    tokenizer: Tokenizer
    config: Any


def find_backbone(section: ModelSection, say: sources.Say = lambda text: None) -> BackboneSource:
    """The recipe's base model without its weights.

    Raises:
        ValueError: the model or its tokenizer does not exist or is damaged, or `keep_layers` does
            not fit it.
    """
    if (file := Path(section.id).expanduser() / "config.json").is_file():
        read_json(file, GET_MODEL)  # whoever reads it next does not name it
    name = sources.resolve(section.id, section.revision, say)
    revision = section.revision if name == section.id else None
    return BackboneSource(
        name, revision, load_tokenizer(name, revision), load_config(section, name)
    )


@contextmanager
def readable_weights(name: str) -> Iterator[None]:
    """Around what loads weights from a folder (or by hub id): a damaged file is named.

    Raises:
        ValueError: there is one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        yield
    except SafetensorError as error:
        damaged = name
        for file in sorted(Path(name).glob("*.safetensors")):
            try:
                safe_open(str(file), "pt")
            except SafetensorError:
                damaged = str(file)
        raise ValueError(f"{damaged}: cannot be read ({error}); {GET_MODEL}") from error


def load_backbone(
    section: ModelSection,
    device: torch.device,
    say: sources.Say = lambda text: None,
    source: BackboneSource | None = None,
) -> Backbone:
    """Load the recipe's base model, frozen and in evaluation mode.

    Args:
        source: what `find_backbone` gave, if it was asked before.

    Raises:
        ValueError: the model, its tokenizer or an option does not exist, or a file is damaged.
        RuntimeError: the checkpoint lacks weights of the architecture.
    """
    from transformers import AutoModel, BitsAndBytesConfig

    source = source or find_backbone(section, say)
    name, revision, config = source.name, source.revision, source.config
    dtype = choose_dtype(section.dtype, device)
    loader_kwargs: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    if section.attention != "auto":
        loader_kwargs["attn_implementation"] = section.attention
    kwargs: dict[str, Any] = {**loader_kwargs, "dtype": dtype}
    if quantization := quantization_kwargs(section, dtype):
        loader_kwargs["quantization_config"] = quantization
        kwargs["quantization_config"] = BitsAndBytesConfig(
            **{key: value for key, value in quantization.items() if key != "quant_method"}
        )
    if device.type == "cuda":
        kwargs["device_map"] = {"": device}
    say(f"loading {section.id} ({section.quantization}, {loader_kwargs['dtype']}) on {device}")
    with readable_weights(name):
        model, info = AutoModel.from_pretrained(
            name, config=config, revision=revision, output_loading_info=True, **kwargs
        )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:4])
        raise RuntimeError(f"{section.id} lacks {len(info['missing_keys'])} weights ({missing} ..)")
    model.requires_grad_(False)
    model.eval()
    keep_weight_layout(model)
    keys = ("num_hidden_layers", "layer_types", "scale_depth")
    cut = section.keep_layers is not None
    config_kwargs = {key: getattr(config, key) for key in keys if cut and hasattr(config, key)}
    return Backbone(model, source.tokenizer, name, dtype, loader_kwargs, config_kwargs)


def keep_weight_layout(model: nn.Module, keep: bool = True) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at a forward in evaluation mode.

    On CPUs with bf16 instructions it does so for speed. The packed layout rounds the scales to
    bf16, and a later step's backward would not know it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", not keep)  # noqa: B010 (not a Module's)


@contextmanager
def float32_arithmetic(model: nn.Module) -> Iterator[None]:
    """Compute in float32 from the weights as they are stored, and put everything back after.

    16-bit rounding differs with batch shapes and threads; in float32 two models that hold the
    same weights agree to many digits, so that what remains is a real difference.
    """
    halves = (torch.bfloat16, torch.float16)
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in halves]
    dtypes = [tensor.dtype for tensor in tensors]
    layers: list[Any] = [m for m in model.modules() if getattr(m, "compute_dtype", None) in halves]
    compute = [layer.compute_dtype for layer in layers]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        for layer in layers:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
        for layer, dtype in zip(layers, compute, strict=True):
            layer.compute_dtype = dtype


def linear_names(model: nn.Module) -> list[str]:
    """Full names of the linear layers (4-bit ones too) an adapter can be put on."""
    kinds: tuple[type, ...] = (nn.Linear,)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def target_modules(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """The recipe's `lora.targets` as full module names.

    Raises:
        ValueError: a name fits no linear layer; the message lists those there are.
    """
    names = linear_names(model)
    if not names:
        raise ValueError(f"lora.targets: {type(model).__name__} has no linear layers to adapt")
    if targets == "all-linear":
        return names
    if isinstance(targets, str):
        inside = {"attention": ("attn", "attention"), "mlp": ("mlp", "fc1", "fc2", "ffn")}[targets]
        chosen = [
            name
            for name in names
            if any(part.endswith(inside) for part in name.split(".")[:-1])
            or name.split(".")[-1] in inside
        ]
        if not chosen:
            raise ValueError(f"lora.targets: no {targets} layers found; {_listing(names)}")
        return chosen
    chosen = []
    for target in targets:
        fitting = [name for name in names if name == target or name.endswith(f".{target}")]
        if not fitting:
            raise ValueError(f"lora.targets: got {target!r}; {_listing(names)}")
        chosen += fitting
    return list(dict.fromkeys(chosen))


def _listing(names: list[str]) -> str:
    last = sorted({name.rpartition(".")[2] for name in names})
    return f"the linear layers of this model are named {', '.join(last)}"


def attach_adapter(
    model: Any,
    section: LoraSection,
    clock: DropoutClock,
    *,
    seed: int,
    revision: str | None = None,
) -> Any:
    """A PeftModel with a fresh LoRA adapter in float32 (float64 on a float64 model).

    Its dropout reads `clock`; see `IdentityDropout`.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=target_modules(model, section.targets),
        use_rslora=section.rslora,
        init_lora_weights=True if section.init == "default" else section.init,
        bias="none",
        task_type="FEATURE_EXTRACTION",
    )
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, config, revision=revision)
    if model.dtype == torch.float64:
        peft_model.double()
    replace_dropout(peft_model, section.dropout, clock)
    use_lean_layers(peft_model)
    peft_model.eval()
    return peft_model


def replace_dropout(peft_model: nn.Module, rate: float, clock: DropoutClock) -> None:
    """Put identity dropout in the place of every LoRA layer's own."""
    if not rate:
        return
    replaced = 0
    for name, module in peft_model.named_modules():
        if isinstance(dropouts := getattr(module, "lora_dropout", None), nn.ModuleDict):
            for key in dropouts:
                dropouts[key] = IdentityDropout(rate, f"{name}.{key}", clock)
                replaced += 1
    assert replaced, "LoRA layers without dropout modules: peft has changed its layout"


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def set_checkpointing(model: Any, every: int) -> None:
    """Non-reentrant gradient checkpointing of every k-th layer from the k-th on; 0 is none, 1 all.

    Not from the first on: where nothing is trained before it, the first layer keeps little.

    Raises:
        ValueError: the architecture does not support it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if every and not base.supports_gradient_checkpointing:
        raise ValueError(
            f"memory.checkpointing: got on, but {type(base).__name__} does not support it; "
            "set it to off and lower memory.token_budget"
        )
    # transformers 5.23 renamed the methods; the older names warn there.
    kind = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    if not every:
        getattr(base, f"{kind}_checkpointing_disable")()
        return
    getattr(base, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i % every == every - 1
