"""The model card: what was trained on what, how it scores, how to use it."""

from __future__ import annotations

from pathlib import Path

from lowmem_cft.recipe.load import to_yaml
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.training.records import Metrics

_USE = """\
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{path}")
vectors = model.encode(["It is raining.", "Take an umbrella."])
```
"""


def _score_rows(metrics: Metrics) -> str:
    lines = ["| set | pairs | before | after |", "| --- | --: | --: | --: |"]
    for old, new in zip(metrics.before, metrics.after, strict=True):
        before, after = f"{100 * old.spearman:.2f}", f"{100 * new.spearman:.2f}"
        lines.append(f"| {new.name} | {new.num_pairs} | {before} | {after} |")
    return "\n".join(lines)


def _metadata(recipe: Recipe, metrics: Metrics, *, hub_base: bool) -> str:
    """The hub's metadata, in YAML."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        base_model=recipe.model.id if hub_base else None,
        tags=[
            "sentence-transformers",
            "sentence-similarity",
            "feature-extraction",
            "dense",
            "lowmem-cft",
            f"dataset_size:{metrics.rows}",
            "loss:InfoNCE",
        ],
    )
    yaml: str = data.to_yaml()
    return yaml


def model_card(recipe: Recipe, metrics: Metrics, path: Path, *, hub_base: bool) -> str:
    """Markdown with the hub's metadata on top.

    Args:
        hub_base: whether the backbone's name may stand as `base_model`, which the hub resolves.
    """
    sources = "\n".join(f"- {source.path}" for source in recipe.data.sources)
    loss, train = recipe.loss, recipe.train
    temperature = f"{loss.temperature}"
    if loss.learn_temperature:
        temperature += f" at first and {metrics.temperature:.4f} in the end (learned)"
    versions = ", ".join(f"{name} {number}" for name, number in metrics.versions.items())
    held = f"{recipe.model.quantization} base" if recipe.model.quantization != "none" else "base"
    return f"""---
{_metadata(recipe, metrics, hub_base=hub_base)}
---

# {recipe.output.name}

{recipe.model.id} ({held}) turned into a sentence-embedding model with lowmem-cft: contrastive
fine-tuning of a LoRA adapter (rank {recipe.lora.rank}), {metrics.steps} steps of
{train.logical_batch} rows, temperature {temperature}, hard negatives: {loss.hard_negatives}.

## Use

{_USE.format(path=path)}
## Scores

{metrics.protocol}, x 100.

{_score_rows(metrics)}

## Training data

{sources}

## Training

{metrics.train_seconds:.0f} s on {metrics.device}, {metrics.rows_per_s:.1f} rows per second,
peak memory {metrics.peak_bytes / 2**30:.2f} GiB. {versions}.

```yaml
{to_yaml(recipe)}```
"""
