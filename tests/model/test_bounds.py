"""Token ids and positions beyond a model's tables: one line, and padding is never the cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_cft.inference.loading import load_model
from lowmem_cft.model import bounds
from lowmem_cft.model.backbone import find_backbone, load_backbone
from lowmem_cft.planning.recipe_plan import plan_recipe
from lowmem_cft.recipe.schema import ModelSection
from lowmem_cft.training.pipeline import run_recipe
from lowmem_cft.units import GIB
from running import MakeRecipe, Silent
from tiny import save_tiny, tiny_tokenizer

CPU = torch.device("cpu")
POSITIONS = 8


def _family(name: str) -> Any:
    import transformers as t

    own = {"vocab_size": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
    bert = {
        "vocab_size": 16,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 1,
    }
    mpt = {"d_model": 8, "n_heads": 2, "n_layers": 1, "vocab_size": 16, "max_seq_len": POSITIONS}
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaConfig(**bert),
        "opt": lambda: t.OPTConfig(**bert, ffn_dim=8, word_embed_proj_dim=8),
        "gpt2": lambda: t.GPT2Config(**own),
        "openai-gpt": lambda: t.OpenAIGPTConfig(**own),
        "gptj": lambda: t.GPTJConfig(**own, rotary_dim=2),
        "mpt": lambda: t.MptConfig(**mpt),
        "bert": lambda: t.BertConfig(**bert),
        "roberta": lambda: t.RobertaConfig(**bert),
    }
    return makers[name]()


@pytest.mark.parametrize(
    "name", ["llama", "opt", "gpt2", "openai-gpt", "gptj", "mpt", "bert", "roberta"]
)
def test_most_positions_is_what_the_model_takes(name: str) -> None:
    from transformers import AutoModel

    model: Any = AutoModel.from_config(_family(name)).eval()

    def takes(num_tokens: int) -> bool:
        try:
            with torch.no_grad():
                model(input_ids=torch.full((1, num_tokens), 5))
        except (IndexError, RuntimeError):
            return False
        return True

    most = bounds.most_positions(model)
    if most is None:
        assert takes(2 * POSITIONS)
    else:
        assert takes(most)
        assert not takes(most + 1)


def _with_token(folder: Path, **special: Any) -> Path:
    """A tiny model whose tokenizer has one token more than the table has rows."""
    from transformers import AutoConfig, AutoModel

    save_tiny(folder)
    tokenizer = tiny_tokenizer()
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = len(tokenizer)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    return folder


def test_padding_is_taken_from_the_table(tmp_path: Path) -> None:
    """A padding token beyond it, in the tokenizer and in the configuration, hurts nothing."""
    import json

    folder = _with_token(tmp_path / "model", pad_token="[PAD]")
    file = folder / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "pad_token_id": values["vocab_size"]}))
    backbone = load_backbone(ModelSection(id=str(folder), quantization="none"), CPU)
    assert backbone.tokenizer.pad_token_id < values["vocab_size"]
    assert backbone.config_kwargs == {"pad_token_id": None}


def test_any_special_token_pads() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.unk_token = tokenizer.bos_token = None
    bounds.choose_padding(tokenizer, None)
    assert tokenizer.pad_token_id in (0, 1, 2, 3)


def test_no_token_pads() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ValueError, match=r'name a token that no text has as "pad_token"'):
        bounds.choose_padding(PreTrainedTokenizerFast(tokenizer_object=words), None)


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("ids", {"text": {"template": "<embed>{text}"}}, r"'<embed>' of the tokenizer has id 40"),
        ("positions", {"text": {"max_tokens": 400}}, r"set text.max_tokens: 127 or less$"),
        ("positions", {"text": {"max_tokens": 128}}, r"may have 129 tokens.*has positions for 128"),
    ],
    ids=["ids", "far", "one"],
)
def test_texts_beyond_the_tables(
    tmp_path: Path, make_recipe: MakeRecipe, command: str, kind: str, values: Any, message: str
) -> None:
    """One line before any weight is read, of `plan` as of training."""
    folder = tmp_path / "model"
    if kind == "ids":
        _with_token(folder, additional_special_tokens=["<embed>"])
    else:
        save_tiny(folder, "opt")
    (folder / "model.safetensors").unlink()
    recipe = make_recipe(model={"id": str(folder)}, **values)
    commands: dict[str, Callable[[], Any]] = {
        "plan": lambda: plan_recipe(recipe, "cpu", GIB),
        "train": lambda: run_recipe(recipe, Silent(), device=CPU),
    }
    with pytest.raises(ValueError, match=message):
        commands[command]()


def test_embedding_beyond_the_tables(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "opt", "opt")
    model = load_model(str(folder), CPU, print, overrides=["text.max_tokens=400"])
    assert len(model.embed(["cat " * 127])) == 1
    with pytest.raises(
        ValueError, match=r"may have 201 tokens .* set text.max_tokens: 127 or less"
    ):
        model.embed(["cat " * 200])


def test_long_texts_of_rotary_models_are_said(tiny_folder: Path) -> None:
    config = find_backbone(ModelSection(id=str(tiny_folder))).config
    assert bounds.beyond_trained(config, 128) is None
    assert "up to 129 tokens" in str(bounds.beyond_trained(config, 129))
