"""The layout that `SentenceTransformer(path)` loads, and the check that it embeds the same.

The exported tokenizer does all of a text's preparation: the template is a normaliser, the
beginning- and end-of-sequence tokens a post-processor. So sentence-transformers needs no code of
ours, and truncation keeps the last token. An adapter export records quantisation and depth of its
base, so that it loads on the base that was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lowmem_cft.data.corpus import document_format, query_format
from lowmem_cft.data.tokens import TextFormat, Tokenizer, adds_eos, overhead
from lowmem_cft.files import whole_folder
from lowmem_cft.inference.embed import Vectors, embed_texts
from lowmem_cft.inference.loading import RECORD
from lowmem_cft.model.backbone import Backbone, float32_arithmetic, keep_weight_layout
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.training.runs import library_versions

Kind = Literal["adapter", "merged"]

MIN_COSINE: dict[Kind, float] = {"adapter": 0.9999, "merged": 0.999}
"""An adapter export computes the same; a merged one rounds its weights to 16 bit once more."""

NUM_CHECKED = 32

_POOLING_KEYS = {
    "last": "pooling_mode_lasttoken",
    "eos": "pooling_mode_lasttoken",
    "mean": "pooling_mode_mean_tokens",
    "weighted-mean": "pooling_mode_weightedmean_tokens",
}


def prepared_tokenizer(tokenizer: Tokenizer, text_format: TextFormat) -> Tokenizer:
    """A tokenizer that turns plain texts into the ids our own token stage makes of them."""
    from tokenizers import Regex
    from tokenizers import Tokenizer as Backend
    from tokenizers.normalizers import Normalizer, Prepend, Replace, Sequence
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = Backend.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    steps: list[Normalizer] = []
    if text_format.head:
        steps.append(Prepend(text_format.head))
    if text_format.tail:
        steps.append(Replace(Regex(r"\z"), text_format.tail))
    if steps:
        if backend.normalizer is not None:
            steps.append(backend.normalizer)
        backend.normalizer = Sequence(steps)
    special = tokenizer("")["input_ids"]
    special = special[:-1] if special and adds_eos(tokenizer) else special
    before = [tokenizer.convert_ids_to_tokens(i) for i in special]
    after = [tokenizer.eos_token] if text_format.append_eos else []
    named = {token: tokenizer.convert_tokens_to_ids(token) for token in before + after}
    backend.post_processor = TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=list(named.items())
    )
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    tokens = {key: str(value) for key in names if (value := getattr(tokenizer, key)) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="right", **tokens)


def _prompts(recipe: Recipe) -> tuple[TextFormat, dict[str, str]]:
    """The format to build into the tokenizer, and what is left for prompts.

    Raises:
        ValueError: the roles' templates differ in a way prompts cannot say.
    """
    query, document = query_format(recipe), document_format(recipe)
    if query == document:
        return query, {}
    if query.tail or document.tail:
        raise ValueError(
            "text.document_template: differs from text.template and one of them goes on after "
            "{text}; sentence-transformers knows prompts only before it, so set "
            "output.export: none, or give templates that end in {text}"
        )
    bare = TextFormat("{text}", query.append_eos, query.max_tokens)
    return bare, {"query": query.head, "document": document.head}


def check_expressible(recipe: Recipe) -> None:
    """Raise ValueError, before anything is trained, where the layout cannot say the recipe."""
    _prompts(recipe)


def _max_seq_length(tokenizer: Tokenizer, recipe: Recipe, model: Any) -> int | None:
    """Tokens to truncate at. Cutting a whole prompt would cut its tail, so with one it is not."""
    formats = (query_format(recipe), document_format(recipe))
    if any(text_format.tail for text_format in formats):
        longest = getattr(model.config, "max_position_embeddings", None)
        return int(longest) if longest else None
    most = max(overhead(tokenizer, text_format) for text_format in formats)
    return most + recipe.text.max_tokens


def _write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_layout(
    folder: Path, recipe: Recipe, backbone: Backbone, kind: Kind, dtype: torch.dtype, width: int
) -> None:
    text_format, prompts = _prompts(recipe)
    prepared_tokenizer(backbone.tokenizer, text_format).save_pretrained(folder)
    modules = ["Transformer", "Pooling"] + ["Normalize"] * recipe.embedding.normalize
    _write_json(
        folder / "modules.json",
        [
            {
                "idx": i,
                "name": str(i),
                "path": "" if i == 0 else f"{i}_{name}",
                "type": f"sentence_transformers.models.{name}",
            }
            for i, name in enumerate(modules)
        ],
    )
    (folder / "2_Normalize").mkdir(exist_ok=True)
    _write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": False,
            **dict.fromkeys(set(_POOLING_KEYS.values()), False),
            _POOLING_KEYS[recipe.embedding.pooling]: True,
            "include_prompt": True,
        },
    )
    adapter = kind == "adapter"
    name = str(dtype).removeprefix("torch.")
    _write_json(
        folder / "sentence_bert_config.json",
        {
            "max_seq_length": _max_seq_length(backbone.tokenizer, recipe, backbone.model),
            "do_lower_case": False,
            "model_args": backbone.loader_kwargs if adapter else {"dtype": name},
            "config_args": backbone.config_kwargs if adapter else {},
        },
    )
    _write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    _write_json(
        folder / RECORD,
        {
            "kind": kind,
            "base": backbone.name,
            "versions": library_versions(),
            "recipe": recipe.model_dump(mode="json"),
        },
    )


def _plain_weight(module: nn.Module) -> torch.Tensor:
    """A linear layer's weight in float32, de-quantised if it is 4-bit."""
    weight = module.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, state)
    assert isinstance(weight, torch.Tensor)
    return weight.detach().float()


def merged_model(encoder: Encoder, dtype: torch.dtype) -> Any:
    """A plain model whose weights are the (de-quantised) base plus the adapter, rounded once."""
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModel

    trained = encoder.model.get_base_model()
    config = type(trained.config).from_dict(trained.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModel.from_config(config, dtype=dtype)
    state: dict[str, torch.Tensor] = {}
    inside_lora = tuple(
        f"{name}." for name, m in trained.named_modules() if isinstance(m, LoraLayer)
    )
    for name, module in trained.named_modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            delta = module.get_delta_weight("default").detach().float()
            state[f"{name}.weight"] = _plain_weight(base) + delta.to(base.weight.device)
            if getattr(base, "bias", None) is not None:
                state[f"{name}.bias"] = base.bias.detach()
        elif isinstance(module, nn.Linear) and not name.startswith(inside_lora):
            state[f"{name}.weight"] = _plain_weight(module)
    for name, value in (*trained.named_parameters(), *trained.named_buffers()):
        if name not in state and not name.startswith(inside_lora) and value.is_floating_point():
            state[name] = value.detach()
    wanted = plain.state_dict()
    state = {name: value.cpu().to(dtype) for name, value in state.items() if name in wanted}
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert not missing + unexpected, f"merge: {missing[:3]} {unexpected[:3]}"
    return plain


def export_model(
    encoder: Encoder, backbone: Backbone, recipe: Recipe, target: Path, kind: Kind
) -> None:
    """Write the model for sentence-transformers; `target` appears whole or not at all.

    Args:
        kind: adapter: the adapter, loaded on its (4-bit) base by name; merged: all weights in
            16 bit, with no need of the base, peft or bitsandbytes.

    Raises:
        ValueError: there is no adapter, or the layout cannot express the recipe.
        OSError: it cannot be written.
    """
    if not hasattr(encoder.model, "peft_config"):
        raise ValueError("nothing to export: this is a base model without an adapter")
    # not config.hidden_size: some models project their last hidden state (OPT-350m)
    width = embed_texts(encoder, backbone.tokenizer, ["a"], query_format(recipe)).shape[1]
    dtype = torch.float16 if backbone.dtype == torch.float16 else torch.bfloat16
    with whole_folder(target) as folder:
        if kind == "adapter":
            encoder.model.save_pretrained(folder, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)
        else:
            merged_model(encoder, dtype).save_pretrained(folder)
        _write_layout(folder, recipe, backbone, kind, dtype, width)


@dataclass(frozen=True)
class ExportCheck:
    """Lowest cosines between our vectors and those of the re-loaded export.

    `min_cosine`: both computed in float32 from the weights as stored, which is what is judged.
    `min_cosine_as_loaded`: each in its own 16-bit arithmetic, as a user runs it; on some CPUs
    bitsandbytes also repacks 4-bit weights for inference and rounds their scales.
    """

    num_texts: int
    min_cosine: float
    min_cosine_as_loaded: float


def _min_cosine(ours: Vectors, theirs: torch.Tensor) -> float:
    a, b = torch.from_numpy(ours).double(), theirs.cpu().double()
    return float(torch.nn.functional.cosine_similarity(a, b).min())


def check_export(
    folder: Path,
    kind: Kind,
    encoder: Encoder,
    tokenizer: Tokenizer,
    recipe: Recipe,
    texts: Sequence[str],
) -> ExportCheck:
    """Load the export with sentence-transformers and compare it with the model it was made from.

    Raises:
        ImportError: sentence-transformers is not installed.
        RuntimeError: an embedding differs by more than `MIN_COSINE` allows.
    """
    from sentence_transformers import SentenceTransformer

    texts = list(texts[:NUM_CHECKED])
    loaded = SentenceTransformer(str(folder), device=str(encoder.device))
    name = "query" if loaded.prompts.get("query") else None

    def lowest() -> float:
        ours = embed_texts(encoder, tokenizer, texts, query_format(recipe))
        theirs = loaded.encode(
            texts, prompt_name=name, convert_to_tensor=True, show_progress_bar=False
        )
        return _min_cosine(ours, theirs)

    keep_weight_layout(loaded)
    with float32_arithmetic(encoder.model), float32_arithmetic(loaded):
        exact = lowest()
    keep_weight_layout(loaded, keep=False)
    check = ExportCheck(len(texts), exact, lowest())
    if not check.min_cosine >= MIN_COSINE[kind]:
        raise RuntimeError(
            f"the exported model in {folder} does not embed as the trained one: lowest cosine of "
            f"{check.num_texts} texts is {check.min_cosine:.5f}, wanted {MIN_COSINE[kind]}; "
            "the trained adapter itself is safe in the run's folder"
        )
    return check
