"""The GPU's script on a CPU, at tiny sizes: what it says, and that its parts do not fail together."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from lowmem_cft import oom
from lowmem_cft.backbone import trainable_parameters
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
    parts = ["--only", "device", "--only", "memory", "--only", "dropout_speed"]
    code = check.main(["--tiny", "--here", *parts, "--models", "MiniCPM-2B", "--out", str(out)])
    found = last_line(capfd)
    assert code == 0
    assert found["ok"]
    assert found == json.loads(out.read_text(encoding="utf-8"))
    assert set(found["parts"]) == {"device", "memory", "dropout_speed"}
    # public: a wheel's metadata may leave out the build, `+cu130`, that the library names
    written = Version(found["versions"]["torch"])
    assert written.public == Version(torch.__version__).public
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

    monkeypatch.setitem(check.PARTS, "device", check.Part(broken, 10))
    out = tmp_path / "found.json"
    code = check.main(
        ["--tiny", "--here", "--only", "device", "--only", "dropout_speed", "--out", str(out)]
    )
    found = last_line(capfd)
    assert code == 1
    assert not found["ok"]
    assert "no such kernel" in found["parts"]["device"]["error"]
    assert found["parts"]["device"]["half"] == 1
    assert found["parts"]["dropout_speed"]["ok"]
    assert json.loads(out.read_text(encoding="utf-8")) == found


def test_a_part_has_a_process_of_its_own(check: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--tiny", "--only", "device"]) == 0
    found = last_line(capfd)["parts"]["device"]
    assert found["matrix_tflops"] > 0
    assert "unfinished" not in found


def test_parts_without_a_recipe_need_no_pydantic(tmp_path: Path) -> None:
    text = "raise ModuleNotFoundError(\"No module named 'pydantic'\", name='pydantic')"
    (tmp_path / "pydantic.py").write_text(text)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    names = ["device", "loss_memory", "loss_tiles", "memory"]
    command = [sys.executable, str(BENCH / "gpu_check.py"), "--tiny", "--here", "--device", "cpu"]
    command += [word for name in names for word in ("--only", name)]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    parts = json.loads(done.stdout.splitlines()[-1])["parts"]
    assert {name: parts[name]["ok"] for name in names} == {n: n != "memory" for n in names}
    assert "'pydantic'" in parts["memory"]["error"]
    assert "carry it along" in parts["memory"]["error"]


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
    weights = Footprint(recipe, config, torch.bfloat16, 150).weights
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
        if path is loss.Path.REFERENCE:
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
    loss._add_findings(tasks, waiting, options, checks)
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
    memory, options = part("parts_memory"), check.Options(torch.device("cpu"), True, 2**20, 100.0)
    found = memory.try_model("MiniCPM-2B", options, "none", 1e12, 10.0)
    assert found["ok"]
    assert "does not fit" in found["skipped"]
    with pytest.raises(ValueError, match="does not fit"):
        memory.try_model("MiniCPM-2B", options, "nf4", 1e12, 10.0)


def test_the_context_beyond_its_allowance_is_taken_off_the_cap(check: Any, part: Any) -> None:
    memory, options = part("parts_memory"), check.Options(torch.device("cpu"), True, 2**33, 100.0)
    for context, less in {2**28: 0, 3 * 2**28: 2**28}.items():
        assert memory.without_excess(options, context).cap_bytes == 2**33 - less


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
    found = memory._loss_phases(options, {"models": {}})
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


def test_calls_are_short_enough_and_leave_nothing_out(check: Any) -> None:
    """Those in the script's own text: at most ten minutes each, every part in one of them."""
    lines = [line for line in check.__doc__.splitlines() if line.count("--only") > 1]
    calls = [check.parse_arguments(shlex.split(line)[2:]) for line in lines]
    assert sorted(name for call in calls for name in check.chosen(call)) == sorted(check.PARTS)
    for call in calls:
        assert check.budget(call) + check._GRACE <= 600
    assert sum(check.budget(call) for call in calls) <= 1800
