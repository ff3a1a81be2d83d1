"""What a recipe names has to be there: told before anything heavy is imported or read."""

from __future__ import annotations

from lowmem_cft.data.formats import check_source_name
from lowmem_cft.evaluation.sts.sets import check_set_name
from lowmem_cft.model.names import check_model_name
from lowmem_cft.model.sources import check_is_model
from lowmem_cft.recipe.schema import Recipe


def check_names(recipe: Recipe, *, rows_in_memory: bool = False) -> None:
    """Refuse a model, a source of rows or an STS set that cannot be there.

    Raises:
        ValueError: the first of them; the message has the recipe's key and the nearest names.
    """
    try:
        key = "model.id"
        check_model_name(recipe.model.id)
        for i, source in enumerate([] if rows_in_memory else recipe.data.sources):
            key = f"data.sources.{i}.path"
            if source.path != "demo":
                check_source_name(source.path)
        for i, name in enumerate(recipe.eval.sets):
            key = f"eval.sets.{i}"
            check_set_name(name)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    check_is_model(recipe.model.id)
