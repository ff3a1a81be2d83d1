"""What does not train exactly is refused by name; mixtures of experts that do are held to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.model.trainable import EXACT_MIXTURES, check_trains, is_mixture
from lowmem_cft.planning.recipe_plan import plan_recipe
from lowmem_cft.recipe.schema import LoraSection, ModelSection
from lowmem_cft.training.pipeline import run_recipe
from lowmem_cft.units import GIB
from numerics import assert_same
from plain import make_batch, make_encoder, plain_gradients, planned_gradients
from running import MakeRecipe, Silent
from tiny import SIZES, tiny_config, tiny_tokenizer


def _config(model_type: str) -> Any:
    from transformers import AutoConfig

    experts = "num_local_experts" if model_type in ("mixtral", "granitemoe", "gpt_oss") else None
    values = {
        **SIZES,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        experts or "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "head_dim": 16,
        "router_jitter_noise": 0.0,
    }
    return AutoConfig.for_model(model_type, **values)


def _model(model_type: str, **options: Any) -> Any:
    from transformers import AutoModel

    torch.manual_seed(0)
    model: Any = AutoModel.from_config(_config(model_type), **options)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)  # so that experts differ
    return model


@pytest.mark.parametrize("pooling", ["eos", "mean"])
@pytest.mark.parametrize("model_type", EXACT_MIXTURES)
def test_chunks_leave_a_mixtures_gradient_unchanged(model_type: str, pooling: str) -> None:
    # the kernel that groups tokens by expert knows no float64
    base = _model(model_type, experts_implementation="eager").double()
    encoder = make_encoder(dropout=0.3, pooling=pooling, base=base)
    batch = make_batch(6, 2, texts=12)
    texts = batch.texts(twins_once=True)
    plan = StepPlan(backward_tokens=24, forward_tokens=60, kept_tokens=0, checkpoint_every=1)
    got, _ = planned_gradients(encoder, batch, texts, plan)
    assert_same(got, plain_gradients(encoder, batch, texts), 1e-10)
    assert all("self_attn" in name for name in got), "a router or an expert is adapted"


@pytest.mark.parametrize(
    "model_type",
    ["deepseek_v3", "phimoe", "llama4_text", "qwen3_next", "jamba", "dbrx", "granitemoehybrid"],
)
def test_other_mixtures_are_refused(model_type: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=f"some/model is a mixture of experts .* {model_type},"):
        check_trains(config, ModelSection(id="some/model"), LoraSection())


@pytest.mark.parametrize("model_type", ["llama", "gemma4_text", "hunyuan_v1_moe", "gpt2"])
def test_one_expert_is_no_mixture(model_type: str) -> None:
    from transformers import AutoConfig

    assert not is_mixture(AutoConfig.for_model(model_type))


def test_a_mixture_is_planned_in_float32(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Its kernel is not traced in float32, and its experts stay as they are in 4 bits."""
    _model("qwen3_moe").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model = {"id": str(tmp_path / "model"), "quantization": "nf4"}
    plan = plan_recipe(make_recipe(model=model, memory={"checkpointing": "off"}), "cpu", GIB)
    assert "experts stay as they are" in plan.notes[0]
    parts = plan.prediction.to_json()["peak_bytes"]
    experts = 2 * 4 * 3 * 32 * SIZES["hidden_size"] * 4  # layers, experts, matrices
    assert parts["weights"] > experts


def test_a_mixtures_adapter_loads_again(tmp_path: Path) -> None:
    """peft takes feed-forward layers of such a model for experts."""
    from peft import PeftModel

    encoder = make_encoder(base=_model("qwen2_moe").float(), dtype=torch.float32)
    encoder.model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(_model("qwen2_moe"), str(tmp_path))
    ids = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        ours, theirs = (m.eval()(input_ids=ids).last_hidden_state for m in (encoder.model, again))
    torch.testing.assert_close(theirs, ours)


def test_orthogonal_needs_an_even_rank() -> None:
    lora = LoraSection(rank=3, init="orthogonal")
    with pytest.raises(ValueError, match=r"lora.rank: got 3, .* set lora.rank: 4"):
        check_trains(tiny_config("llama"), ModelSection(), lora)


def test_a_multimodal_model_is_refused_and_its_text_part_trains(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way out that the message names is followed here."""
    import re

    from transformers import AutoModelForImageTextToText, Gemma3Config

    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    recipe = make_recipe(model={"id": str(tmp_path / "whole"), "keep_layers": 2})
    message = r"whole \(gemma3\) reads more than text"
    with pytest.raises(ValueError, match=message) as refused:
        plan_recipe(recipe, "cpu", GIB)
    with pytest.raises(ValueError, match=message):
        run_recipe(recipe, Silent())
    (code,) = re.findall(r"`(.*)`", str(refused.value))
    monkeypatch.chdir(tmp_path)
    exec(code)
    tiny_tokenizer().save_pretrained(tmp_path / "FOLDER")
    section = ModelSection(id=str(tmp_path / "FOLDER"), quantization="none", dtype="fp32")
    backbone = load_backbone(section, torch.device("cpu"))
    check_trains(backbone.model.config, section, LoraSection())
    assert type(backbone.model).__name__ == "Gemma3TextModel"
