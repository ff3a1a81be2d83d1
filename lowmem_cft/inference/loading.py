"""A run, an exported model or a base model, by its name -> an encoder that embeds texts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem_cft.data.tokens import TextFormat, Tokenizer, document_format, query_format
from lowmem_cft.files import read_json
from lowmem_cft.inference.embed import Role, Vectors, embed_texts, role_named
from lowmem_cft.model.backbone import Backbone, load_backbone, readable_weights
from lowmem_cft.model.configs import GET_MODEL
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.model.exported import RECORD, read_record
from lowmem_cft.model.precision import float32_arithmetic
from lowmem_cft.progress import Say
from lowmem_cft.recipe import schema as recipes
from lowmem_cft.recipe.load import (
    apply_override,
    load_recipe,
    load_saved,
    parse_recipe,
    parse_saved,
)
from lowmem_cft.run_folder import RunFolder


@dataclass(frozen=True)
class Embedder:
    """A loaded model and the recipe by which it embeds.

    `float32`: computes in float32 from the weights as stored. In 16 bit a text's embedding, and so
    the third decimal of a score, depends on what it is batched with.
    """

    encoder: Encoder
    backbone: Backbone
    recipe: recipes.Recipe
    float32: bool = False

    @property
    def tokenizer(self) -> Tokenizer:
        return self.backbone.tokenizer

    @property
    def text_format(self) -> TextFormat:
        return query_format(self.recipe)

    def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role | None = None,
        text_format: TextFormat | None = None,
        on_progress: Callable[[int], None] = lambda texts: None,
        say: Say = warnings.warn,
    ) -> Vectors:
        """float32 (texts, D), row i for text i.

        Args:
            role: query (also where it is None) or document: whose template is put around the texts.
            text_format: in the place of the recipe's template, end token and length.
            on_progress: told how many more distinct texts are done, after each chunk.
            say: told why tokens that texts begin with are not run once for all.

        Raises:
            ValueError: there are no texts, or no such role.
        """
        is_document = role_named(role) == "document"
        of_role = document_format(self.recipe) if is_document else self.text_format
        model = self.encoder.model
        with float32_arithmetic(model) if self.float32 else nullcontext():
            return embed_texts(
                self.encoder,
                self.tokenizer,
                texts,
                text_format=text_format or of_role,
                token_budget=self.recipe.eval.token_budget,
                on_progress=on_progress,
                say=say,
            )


def says_how_it_embeds(folder: Path) -> bool:
    """Whether the folder is a run's or an export of ours: its own recipe holds, and no other."""
    return (folder / RECORD).is_file() or (folder / "recipe.yaml").is_file()


def _find(
    name: str, recipe_name: str | None, overrides: Sequence[str]
) -> tuple[recipes.Recipe, Path | None]:
    """The recipe a model embeds by, and the folder of its adapter if it has one."""
    path = Path(name).expanduser()
    if says_how_it_embeds(path) and (recipe_name is not None or overrides):
        raise ValueError(f"{name} says itself how it embeds; leave out `recipe` and `overrides`")
    if (record := read_record(path)) is not None:
        recipe = parse_saved(record["recipe"], str(path / RECORD))
        if record["kind"] == "adapter":
            return recipe, path
        plain = {"id": str(path), "revision": None, "quantization": "none", "keep_layers": None}
        return recipe.with_values("model", **plain), None
    if (path / "recipe.yaml").is_file():
        run = RunFolder(path)
        if not run.adapter.is_dir():
            raise ValueError(
                f"{path} is a run without a final adapter; finish it with "
                f"`lowmem-cft train {run.recipe} --resume`"
            )
        return load_saved(run.recipe), run.adapter
    if recipe_name is not None:
        return load_recipe(recipe_name, overrides).with_values("model", id=name), None
    values = {
        "model": {"id": name, "quantization": "none"},
        "data": {"sources": [{"path": "demo"}]},
    }
    for assignment in overrides:
        apply_override(values, assignment)
    return parse_recipe(values, name), None


def load_model(
    name: str,
    device: torch.device,
    say: Say,
    *,
    recipe_name: str | None = None,
    overrides: Sequence[str] = (),
) -> Embedder:
    """Load a run's folder, an exported model's folder, or any base model.

    Args:
        name: folder or hub id.
        recipe_name: for a base model, the recipe whose text and embedding sections to use.
        overrides: for a base model, assignments such as `text.max_tokens=64`.

    Raises:
        ValueError: nothing of that name, an unfinished run, a damaged file, or a recipe or
            assignments for a folder that has a recipe of its own.
    """
    recipe, adapter = _find(name, recipe_name, overrides)
    return load_by_recipe(recipe, device, say, adapter)


def load_by_recipe(
    recipe: recipes.Recipe, device: torch.device, say: Say, adapter: Path | None = None
) -> Embedder:
    """Load a recipe's base model, with an adapter if one is given, to embed as the recipe says.

    Raises:
        ValueError: there is no such model, or a file of it is damaged.
    """
    backbone = load_backbone(recipe.model, device, say)
    model = backbone.model
    if adapter is not None:
        from peft import PeftModel

        read_json(adapter / "adapter_config.json", GET_MODEL)  # peft does not name it
        with readable_weights(str(adapter)):
            model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
        model.eval()
    encoder = Encoder(model, pooling=recipe.embedding.pooling, normalize=recipe.embedding.normalize)
    return Embedder(encoder, backbone, recipe)
