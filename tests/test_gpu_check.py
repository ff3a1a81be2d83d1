"""The GPU's script on a CPU, at tiny sizes: what it says, and that its parts do not fail together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_cft import oom
from lowmem_cft.footprint import Footprint

BENCH = Path(__file__).parents[1] / "bench"
STEP_KEYS = {
    "rows",
    "plan",
    "moment",
    "seconds",
    "tokens_per_s",
    "tflops",
    "share_of_matrix_peak",
    "predicted_bytes",
    "allocated_bytes",
    "reserved_bytes",
    "ratio",
    "ratio_reserved",
    "ratio_step",
    "context_bytes",
    "ran_out",
    "within_cap",
}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_check

    # `dropout` and `measure` are names of bench/ alone, and stay so
    yield gpu_check
    for name in ("dropout", "measure", "gpu_check"):
        sys.modules.pop(name, None)


def last_line(capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    return found


def test_memory_and_speed(check: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    parts = ["--only", "device", "--only", "memory", "--only", "dropout_speed"]
    code = check.main(["--tiny", "--here", *parts, "--models", "MiniCPM-2B", "--out", str(out)])
    found = last_line(capfd)
    assert code == 0
    assert found["ok"]
    assert found == json.loads(out.read_text(encoding="utf-8"))
    assert set(found["parts"]) == {"device", "memory", "dropout_speed"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["device"]
    assert found["parts"]["dropout_speed"]["rows"][0]["ratio"] > 0
    memory = found["parts"]["memory"]
    assert set(memory["models"]) == {"MiniCPM-2B"}
    for model in memory["models"].values():
        assert model["quantization"] == "nf4", memory
        for measured, predicted in model["weights"].values():
            assert measured == predicted
        for step in model["steps"]:
            assert step.keys() >= STEP_KEYS
            assert 0.9 <= step["ratio_step"] <= 1.15, step
            assert 0.9 <= step["ratio"] <= 1.15, step
    for loss in memory["loss_phase"]:
        assert loss["ok"]
        assert loss["allocated_bytes"] > loss["embedding_bytes"] + loss["gradient_bytes"]


def test_correctness(
    check: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "FAMILIES", ("gemma",))
    monkeypatch.setattr(oom.gc, "collect", lambda: 0)  # looks at all of the test session's objects
    assert check.main(["--tiny", "--here", "--only", "correctness"]) == 0
    part = last_line(capfd)["parts"]["correctness"]
    assert part["failed"] == []
    assert part["num_checks"] > 50
    kinds = {"plans in float64", "plans in float32", "plans on nf4", "out of memory", "second run"}
    assert part["worst"].keys() >= kinds | {"dropout on the device", "bf16 error by plain's"}
    assert 0 < part["worst"]["plans in float64"]["value"] <= 1e-10


def test_a_check_that_does_not_hold_is_listed(check: Any) -> None:
    options = check.Options(torch.device("cpu"), True, 2**30, 100.0)
    checks = check.Checks(options)

    def group(_: Any, inner: Any) -> None:
        inner.at_most("kind", "name", float("nan"), 1.0)
        inner.at_most("kind", "other", 0.5, 1.0)
        raise RuntimeError("broken")

    checks.group("a group", group)
    found = checks.to_json()
    assert not found["ok"]
    assert [failed.get("name") for failed in found["failed"]] == ["name", None]
    assert "broken" in found["failed"][1]["error"]


def test_a_failing_part_does_not_stop_the_others(
    check: Any,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def broken(options: Any) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(check.PARTS, "device", check.Part(broken, 10))
    out = tmp_path / "found.json"
    code = check.main(
        ["--tiny", "--here", "--only", "device", "--only", "dropout_speed", "--out", str(out)]
    )
    found = last_line(capfd)
    assert code == 1
    assert not found["ok"]
    assert "no such kernel" in found["parts"]["device"]["error"]
    assert found["parts"]["dropout_speed"]["ok"]
    assert json.loads(out.read_text(encoding="utf-8")) == found


def test_a_part_has_a_process_of_its_own(check: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--tiny", "--only", "device"]) == 0
    part = last_line(capfd)["parts"]["device"]
    assert part["matrix_tflops"] > 0
    assert "unfinished" not in part


def test_what_a_killed_process_had_found_is_kept(check: Any, tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[-1]).write_text(json.dumps({'ok': True, 'half': 1}))\n"
        "time.sleep(60)\n"
    )
    found = check.run_limited(script, [], 1.0)
    assert found["half"] == 1
    assert "killed" in found["error"]
    script.write_text("raise SystemExit(3)")
    assert "ended with 3" in check.run_limited(script, [], 30.0)["error"]


@pytest.mark.parametrize("name", ["MiniCPM-2B", "Gemma-2B", "Phi-2", "LLaMA-8B"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_models_are_built_as_the_planner_weighs_them(
    check: Any, name: str, quantization: str
) -> None:
    from transformers import AutoModel

    preset, overrides = check.MODELS[name]
    recipe = check.make_recipe(preset, [*overrides, f"model.quantization={quantization}"])
    config, device = check.config_for(name, recipe, True), torch.device("cpu")
    base = check.build_base(config, recipe, torch.bfloat16, device)
    linear = {type(base.get_submodule(n)).__name__ for n in check.linear_names(base)}
    assert linear == ({"Linear4bit"} if quantization == "nf4" else {"Linear"})
    weights = Footprint(recipe, config, torch.bfloat16, 150).weights
    assert check.weight_bytes(base) == (weights.quantized_bytes, weights.plain_bytes)
    assert not any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))
    real = dict(AutoModel.from_config(config, dtype=torch.bfloat16).named_buffers())
    assert real.keys() == dict(base.named_buffers()).keys()
    for key, buffer in base.named_buffers():
        torch.testing.assert_close(buffer, real[key], rtol=0, atol=0)
    encoder = check.attach(base, recipe)
    adapted = [m for m in encoder.model.modules() if "lora_A" in m._modules]
    assert len(adapted) == len(check.trainable_parameters(encoder.model)) // 2 > 0


def test_real_shapes_have_the_published_sizes(check: Any) -> None:
    """Weights in thousand millions, embeddings included, without a separate head."""
    published = {"MiniCPM-2B": 2.72, "Gemma-2B": 2.51, "Phi-2": 2.65, "LLaMA-8B": 7.50}
    for name, wanted in published.items():
        preset, overrides = check.MODELS[name]
        config = check.config_for(name, check.make_recipe(preset, overrides), False)
        skeleton = check.skeleton(config, torch.bfloat16)
        numel = sum(parameter.numel() for parameter in skeleton.parameters())
        assert numel / 1e9 == pytest.approx(wanted, rel=0.01)
