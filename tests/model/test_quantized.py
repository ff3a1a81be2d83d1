"""Checkpoints that are quantised already: loaded as they are, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_cft.exporting.finished import export_run
from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.model.configs import config_without_weights
from lowmem_cft.model.trainable import check_trains
from lowmem_cft.planning.footprint import weigh
from lowmem_cft.recipe.schema import LoraSection, ModelSection
from lowmem_cft.training.pipeline import run_recipe
from running import MakeRecipe, Silent
from tiny import tiny_config, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nf4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head, saved in 4 bits but for one layer's feed-forward network."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(folder / "plain")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.layers.1.mlp"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=quantization, dtype=torch.float32
    )
    model.save_pretrained(folder / "nf4")
    tiny_tokenizer().save_pretrained(folder / "nf4")
    return folder / "nf4"


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_4_bit_checkpoint_loads_as_it_is(nf4_folder: Path, quantization: Any) -> None:
    said: list[str] = []
    section = ModelSection(id=str(nf4_folder), quantization=quantization, dtype="fp32")
    backbone = load_backbone(section, CPU, said.append)
    kinds = [type(layer.mlp.up_proj).__name__ for layer in backbone.model.layers]
    assert kinds == ["Linear4bit", "Linear", "Linear4bit"]
    assert "quantization_config" not in backbone.loader_kwargs
    assert any("nf4 of bitsandbytes, as saved" in text for text in said)
    four_bit = [m for m in backbone.model.modules() if type(m).__name__ == "Linear4bit"]
    packed = sum(m.weight.nbytes for m in four_bit)
    config = config_without_weights(section)
    weights = weigh(config, section, LoraSection(), torch.float32)
    assert packed < weights.quantized_bytes < 1.3 * packed
    plain = [p for p in backbone.model.parameters() if p.dtype.is_floating_point]
    assert weights.plain_bytes == sum(t.nbytes for t in [*plain, *backbone.model.buffers()])


def test_a_run_on_a_4_bit_checkpoint(
    nf4_folder: Path, make_recipe: MakeRecipe, tmp_path: Path, traced_once: None
) -> None:
    """It is trained, gone on with, and exported in both ways; exports are compared with it."""
    values: dict[str, Any] = {
        "model": {"id": str(nf4_folder)},
        "eval": {"sets": []},
        "output": {"export": "adapter"},
    }
    steps = {"logical_batch": 16, "learning_rate": 1e-2, "warmup_steps": 1}
    run_recipe(make_recipe(**values, train={**steps, "steps": 1}), Silent(), device=CPU)
    longer = make_recipe(**values, train={**steps, "steps": 2})
    folder, metrics = run_recipe(longer, Silent(), resume=True, new_rate=True, device=CPU)
    assert metrics.export is not None
    assert metrics.export.checked
    export_run(folder.path, tmp_path / "merged", "merged", CPU, Silent())
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8 of bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
    ids=["int8", "gptq", "awq", "fp8", "mxfp4"],
)
def test_other_quantisations_are_refused(own: dict[str, Any], message: str) -> None:
    config = tiny_config("llama")
    config.quantization_config = own
    with pytest.raises(ValueError, match=rf"some/model is quantised already \({message}\)"):
        check_trains(config, ModelSection(id="some/model"), LoraSection())
