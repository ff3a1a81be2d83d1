"""Contrastive fine-tuning of decoder language models into embedding models, on one small GPU.

    import lowmem_cft as lc

    run = lc.train("mine.yaml")
    vectors = lc.load(run.folder).embed(["It is raining.", "Take an umbrella."])

Nothing heavy is imported until one of the names below is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem_cft.api import (
        Run,
        compare,
        evaluate,
        export,
        load,
        open_run,
        plan,
        search_demonstrations,
        train,
    )
    from lowmem_cft.data.rows import TrainRow
    from lowmem_cft.inference.embedder import Embeds
    from lowmem_cft.inference.loading import Embedder
    from lowmem_cft.recipe.load import load_recipe
    from lowmem_cft.recipe.schema import Recipe

__version__ = "0.1.0"

__all__ = [
    "Embedder",
    "Embeds",
    "Recipe",
    "Run",
    "TrainRow",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "load",
    "load_recipe",
    "open_run",
    "plan",
    "search_demonstrations",
    "train",
]

_HOMES = {
    "Embedder": "inference.loading",
    "Embeds": "inference.embedder",
    "Recipe": "recipe.schema",
    "TrainRow": "data.rows",
    "load_recipe": "recipe.load",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
