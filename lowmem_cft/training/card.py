"""Model cards: what was trained on what, how it scores, how to use it.

A card lies in the folder that it is about, and its code works for a reader who has that folder alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowmem_cft.data.tokens import document_format, query_format
from lowmem_cft.exporting.layout import Kind
from lowmem_cft.files import read_json
from lowmem_cft.model.backbone import Backbone
from lowmem_cft.model.configs import GET_MODEL
from lowmem_cft.model.exported import RECORD
from lowmem_cft.recipe.load import load_saved, to_yaml
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.run_folder import RunFolder
from lowmem_cft.training.records import Metrics, read_metrics

FOLDER = "path/to/this/folder"
"""What stands in a card's code for the folder that the card lies in."""

_SENTENCE_TRANSFORMERS = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder}")  # the folder of this card, or its name on the hub
"""
_ENCODE = """\
vectors = model.encode(["It is raining.", "Take an umbrella."])
"""
_ENCODE_ROLES = """\
queries = model.encode_query(["Is it raining?"])
documents = model.encode_document(["Take an umbrella.", "The sun is out."])
similarities = model.similarity(queries, documents)
"""
_LOWMEM_CFT = """\
import lowmem_cft as lc

model = lc.load("{folder}")  # the run's folder, in which this card lies
"""
_EMBED = """\
vectors = model.embed(["It is raining.", "Take an umbrella."])
"""
_EMBED_ROLES = """\
queries = model.embed(["Is it raining?"], role="query")
documents = model.embed(["Take an umbrella.", "The sun is out."], role="document")
"""
_PEFT = """\
from peft import PeftModel
from transformers import AutoModel

base = AutoModel.from_pretrained(
{arguments}
)
model = PeftModel.from_pretrained(base, "{folder}", autocast_adapter_dtype=False)
"""


def _code(*parts: str, **values: str) -> str:
    return f"```python\n{''.join(parts).format(folder=FOLDER, **values)}```\n"


def _has_roles(recipe: Recipe) -> bool:
    return query_format(recipe) != document_format(recipe)


def _is_on_hub(base: str) -> bool:
    return not Path(base).exists()


def _base_note(recipe: Recipe, base: str) -> str:
    """Which base an adapter needs, and how a reader elsewhere gets it."""
    packages = "peft and bitsandbytes" if recipe.model.quantization != "none" else "peft"
    needs = f"Besides sentence-transformers it needs {packages}, and the base that it is an adapter of: "
    if _is_on_hub(base):
        return f"{needs}{base}, which is loaded from the hub.\n"
    return (
        f"{needs}the folder `{base}` of the machine it was trained on (made of "
        f"`{recipe.model.id}`). On another machine, put that folder there and its path into "
        "`adapter_config.json` as `base_model_name_or_path`; or export the run anew with "
        "`lowmem-cft export RUN --merged --out FOLDER`, which needs no base.\n"
    )


def _use(recipe: Recipe, base: str, kind: Kind | None) -> str:
    """How an export is used, or the run's folder where `kind` is None."""
    roles = _has_roles(recipe)
    if kind is None:
        code = _code(_LOWMEM_CFT, _EMBED_ROLES if roles else _EMBED)
        if recipe.output.export != "none":
            code += "\nThe folder `model` beside this card is for sentence-transformers; it has a card.\n"
        return code
    code = _code(_SENTENCE_TRANSFORMERS, _ENCODE_ROLES if roles else _ENCODE)
    return code if kind == "merged" else f"{code}\n{_base_note(recipe, base)}"


def _score_section(metrics: Metrics) -> str:
    if not metrics.after:
        return ""
    lines = ["| set | pairs | before | after |", "| --- | --: | --: | --: |"]
    for old, new in zip(metrics.before, metrics.after, strict=True):
        before, after = f"{100 * old.spearman:.2f}", f"{100 * new.spearman:.2f}"
        lines.append(f"| {new.name} | {new.num_pairs} | {before} | {after} |")
    rows = "\n".join(lines)
    return f"## Scores\n\n{metrics.protocol}, x 100.\n\n{rows}\n\n"


def _metadata(library: str, base: str, tags: list[str], **values: Any) -> str:
    """The hub's metadata, in YAML; a base is named if the hub can resolve it."""
    from huggingface_hub import ModelCardData

    known = base if _is_on_hub(base) else None
    data = ModelCardData(library_name=library, base_model=known, tags=tags, **values)
    yaml: str = data.to_yaml()
    return yaml


def _held(recipe: Recipe) -> str:
    return f"{recipe.model.quantization} base" if recipe.model.quantization != "none" else "base"


def model_card(recipe: Recipe, metrics: Metrics, base: str, kind: Kind | None) -> str:
    """Markdown with the hub's metadata on top.

    Args:
        base: the base's hub id, or its folder.
        kind: of the export whose card it is; None for the card of a run's folder.
    """
    sources = "\n".join(f"- {source.path}" for source in recipe.data.sources)
    loss, train = recipe.loss, recipe.train
    temperature = f"{loss.temperature}"
    if loss.learn_temperature:
        temperature += f" at first and {metrics.temperature:.4f} in the end (learned)"
    versions = ", ".join(f"{name} {number}" for name, number in metrics.versions.items())
    tags = [
        "sentence-transformers",
        "sentence-similarity",
        "feature-extraction",
        "dense",
        "lowmem-cft",
        f"dataset_size:{metrics.rows}",
        "loss:InfoNCE",
    ]
    metadata = _metadata("sentence-transformers", base, tags, pipeline_tag="sentence-similarity")
    return f"""---
{metadata}
---

# {recipe.output.name}

{recipe.model.id} ({_held(recipe)}) turned into a sentence-embedding model with lowmem-cft: contrastive
fine-tuning of a LoRA adapter (rank {recipe.lora.rank}), {metrics.steps} steps of
{train.logical_batch} rows, temperature {temperature}, hard negatives: {loss.hard_negatives}.

## Use

{_use(recipe, base, kind)}
{_score_section(metrics)}## Training data

{sources}

## Training

{metrics.train_seconds:.0f} s on {metrics.device}, {metrics.rows_per_s:.1f} rows per second,
peak memory {metrics.peak_bytes / 2**30:.2f} GiB. {versions}.

```yaml
{to_yaml(recipe)}```
"""


def write_export_card(run: RunFolder, target: Path) -> None:
    """Write the card of an export of a finished run; one without metrics has nothing to tell."""
    if run.metrics.is_file():
        record = read_json(target / RECORD, GET_MODEL, "kind", "base")
        recipe = load_saved(run.recipe)
        card = model_card(recipe, read_metrics(run), record["base"], record["kind"])
        (target / "README.md").write_text(card, encoding="utf-8")


def adapter_card(recipe: Recipe, backbone: Backbone) -> str:
    """Markdown for the folder of an adapter alone, with the hub's metadata on top."""
    formats = {"query": query_format(recipe), "document": document_format(recipe)}
    if not _has_roles(recipe):
        formats = {"text": formats["query"]}
    templates = "\n".join(
        f"- a {role}: {text_format.template!r}, the text cut to {text_format.max_tokens} tokens"
        for role, text_format in formats.items()
    )
    keywords = {**backbone.loader_kwargs, **backbone.config_kwargs}
    arguments = [repr(backbone.name), *(f"{key}={value!r}" for key, value in keywords.items())]
    end = "with the end-of-sequence token behind it" if recipe.text.append_eos else "as it stands"
    length = ", brought to length 1" if recipe.embedding.normalize else ""
    return f"""---
{_metadata("peft", backbone.name, ["lora", "feature-extraction", "lowmem-cft"])}
---

# {recipe.output.name}, the adapter

A LoRA adapter (rank {recipe.lora.rank}) by which {recipe.model.id} ({_held(recipe)}) embeds sentences,
trained with lowmem-cft.

## Use

`lowmem-cft embed RUN texts.txt` and `lowmem-cft export RUN` take the run's folder, in which this one
lies. The adapter alone is loaded by peft:

{_code(_PEFT, arguments=chr(10).join(f"    {argument}," for argument in arguments))}
It does not say how a text becomes a vector; `recipe.yaml` of the run does (an export has it in
`lowmem_cft.json`):

{templates}
- tokenised with the base's tokenizer, {end}
- pooling: {recipe.embedding.pooling}{length}
"""
