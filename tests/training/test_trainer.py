"""The whole line on a tiny model: train, stop, go on, export, load again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowmem_cft.gradient import step
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.training import interrupt, pipeline
from lowmem_cft.training.checkpoint import load_state
from lowmem_cft.training.records import StepLine, read_lines
from lowmem_cft_kernels import GTE, FalseNegatives, LearnedTemperature, LossOptions, info_nce
from lowmem_cft_kernels.reference import reference_loss
from running import MakeRecipe, Silent, sentences, start

CPU = torch.device("cpu")


def strip_times(lines: list[StepLine]) -> list[dict[str, Any]]:
    timed = ("_per_s", "step_ms", "peak_bytes")
    return [{k: v for k, v in line.to_json().items() if not k.endswith(timed)} for line in lines]


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned temperature"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_resumed_run_is_the_same_bit_for_bit(
    make_recipe: MakeRecipe, optimizer: str, learned: bool
) -> None:
    made = make_recipe(
        train={"optimizer": optimizer, "save_every": 2},
        eval={"every": 2},
        loss={"learn_temperature": learned},
    )
    whole = Silent()
    trainer = start(made, whole)
    trainer.train()
    wanted = load_file(trainer.folder.adapter / "adapter_model.safetensors")

    def stop(line: StepLine) -> None:
        if line.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    # The signal arrives while step 3 is reported: it is the last one before the stop, and its
    # checkpoint is one that save_every would not have written.
    with pytest.raises(interrupt.Interrupted, match=r"after step [34] of 5.*`resume`"):
        start(made, Silent(stop), overwrite=True).train()
    rest = Silent()
    resumed = start(made, rest, resume=True)
    assert resumed.step_index in (3, 4)
    resumed.train()
    got = load_file(resumed.folder.adapter / "adapter_model.safetensors")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert strip_times(read_lines(resumed.folder)) == strip_times(whole.lines)
    assert float(wanted[next(k for k in wanted if "lora_B" in k)].abs().max()) > 0
    if learned:
        assert trainer.job.temperature is not None
        assert resumed.job.temperature is not None
        assert torch.equal(resumed.job.temperature.raw, trainer.job.temperature.raw)
        seen = [line.temperature for line in whole.lines]
        assert seen[0] == seen[1], "the first update has a learning rate of 0"
        assert len(set(seen[1:])) == 4


def spy_on_the_loss(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Queries, documents and candidates of every call, as it comes."""
    given = []

    def spy(query_MD: torch.Tensor, doc_ND: torch.Tensor, candidates: Any, **kwargs: Any) -> Any:
        given.append((query_MD.clone(), doc_ND.clone(), candidates))
        return info_nce(query_MD, doc_ND, candidates, **kwargs)

    monkeypatch.setattr(step, "info_nce", spy)
    return given


def test_a_learned_temperature_moves_within_its_bounds(make_recipe: MakeRecipe) -> None:
    observer = Silent()
    made = make_recipe(
        train={"steps": 12, "learning_rate": 0.3, "warmup_steps": 0},
        loss={"learn_temperature": True, "temperature_bounds": [0.04, 0.06]},
    )
    folder, metrics = pipeline.run_recipe(made, observer)
    seen = [*(line.temperature for line in observer.lines), metrics.temperature]
    assert seen[0] == pytest.approx(0.05)
    assert all(0.04 < value < 0.06 for value in seen)
    assert len(set(seen)) == len(seen), "it stands still"
    assert (
        f"temperature 0.05 at first and {seen[-1]:.4f}" in (folder.path / "README.md").read_text()
    )
    assert (
        f"temperature 0.05 at first and {seen[-1]:.4f}" in (folder.model / "README.md").read_text()
    )
    assert metrics.temperature == json.loads(folder.metrics.read_text())["temperature"]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_learned_temperature_goes_down_its_gradient(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Adam's first step is the learning rate, against the gradient's sign."""
    given = spy_on_the_loss(monkeypatch)
    section = {"optimizer": optimizer, "warmup_steps": 0, "weight_decay": 0.9, "steps": 100}
    trainer = start(make_recipe(train=section, loss={"learn_temperature": True}))
    assert trainer.job.temperature is not None
    wanted = LearnedTemperature(0.05, 0.005, 1.0)
    assert torch.equal(trainer.job.temperature.raw.cpu(), wanted.raw)
    trainer.step()
    reference_loss(*given[0], LossOptions(temperature=wanted()))[0].backward()
    assert wanted.raw.grad is not None
    assert abs(float(wanted.raw.grad)) > 1e-3
    moved = trainer.job.temperature.raw.detach().cpu() - wanted.raw.detach()
    assert float(moved) == pytest.approx(-0.01 * float(wanted.raw.grad.sign()), rel=1e-3)


OBSERVED = ("accuracy", "mean_rank", "masked_share", "mean_positive", "mean_negative")


def test_what_the_loss_observes_is_in_the_log(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the reference on the embeddings that the loss was given."""
    given = spy_on_the_loss(monkeypatch)
    observer = Silent()
    made = make_recipe(
        train={"steps": 2}, loss={"softmaxes": "gte", "false_negative_margin": -0.05}
    )
    trainer = start(made, observer)
    metrics = trainer.train()
    lines = read_lines(trainer.folder)
    assert len(lines) == len(given) == 2
    for line, tensors in zip(lines, given, strict=True):
        loss, observed = reference_loss(
            *tensors,
            LossOptions(
                temperature=0.05,
                softmaxes=GTE,
                false_negatives=FalseNegatives(margin=-0.05),
            ),
        )
        assert line.loss == pytest.approx(float(loss), rel=1e-4)
        for name in OBSERVED:
            assert getattr(line, name) == pytest.approx(float(getattr(observed, name)), rel=1e-4), (
                name
            )
        assert 0 < line.accuracy < 1 < line.mean_rank
        assert 0 < line.masked_share < 1
        assert line.mean_negative < line.mean_positive
    assert sum(said.startswith("loss by the ") for said in observer.said) == 1
    assert "attention kernels: cpu" in observer.said
    assert metrics.attention == ["cpu"]


def test_the_log_is_json_where_nothing_is_a_negative(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    rows = tmp_path / "same.jsonl"
    rows.write_text('{"anchor": "the cat", "positive": "a dog"}\n' * 2)
    made = make_recipe(
        data={"sources": [{"path": str(rows)}]}, train={"logical_batch": 2, "steps": 1}
    )
    trainer = start(made)
    trainer.train()
    line = json.loads(trainer.folder.log.read_text(), parse_constant=pytest.fail)
    assert line["mean_negative"] is None
    assert (line["masked_share"], line["accuracy"], line["loss"]) == (1.0, 1.0, 0.0)


def test_all_loss_options_together_train(make_recipe: MakeRecipe) -> None:
    observer = Silent()
    loss = {
        "softmaxes": "qwen3",
        "false_negative_margin": 0.05,
        "false_negative_relative": True,
        "hardness": 3.0,
        "hardness_on": "hard",
        "learn_temperature": True,
    }
    made = make_recipe(train={"steps": 30}, lora={"dropout": 0.0}, loss=loss)
    folder, metrics = pipeline.run_recipe(made, observer)
    assert observer.lines[-1].loss < 0.7 * observer.lines[0].loss
    assert metrics.export.checked is True
    assert load_recipe(str(folder.recipe)) == made


def test_chunks_do_not_change_the_run(make_recipe: MakeRecipe) -> None:
    adapters = []
    for budget in (16, 4096):
        trainer = start(make_recipe(memory={"token_budget": budget}), overwrite=True)
        trainer.train()
        adapters.append(load_file(trainer.folder.adapter / "adapter_model.safetensors"))
    for key, wanted in adapters[0].items():
        assert torch.allclose(adapters[1][key], wanted, atol=2e-4), key


def test_not_a_number_stops_with_the_checkpoint_kept(make_recipe: MakeRecipe) -> None:
    trainer = start(make_recipe())
    trainer.step()
    trainer.save()
    for parameter in trainer.job.parameters:
        parameter.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"loss of step 2 is nan; lower train.learning_rate"):
        trainer.step()
    assert load_state(trainer.folder).step == 1


def test_failing_step_saves_what_was_reached(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_recipe()
    whole = start(made)
    whole.train()
    wanted = load_file(whole.folder.adapter / "adapter_model.safetensors")
    trainer = start(made, overwrite=True)

    def no_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.observer = Silent(
        lambda line: (
            monkeypatch.setattr(step, "gradcache_step", no_memory) if line.step == 2 else None
        )
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    monkeypatch.undo()
    resumed = start(made, resume=True)
    assert resumed.step_index == 2
    resumed.train()
    got = load_file(resumed.folder.adapter / "adapter_model.safetensors")
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_half_a_log_line_does_not_stop_a_resume(make_recipe: MakeRecipe) -> None:
    made = make_recipe(train={"steps": 2})
    trainer = start(made)
    trainer.train()
    with trainer.folder.log.open("a") as file:
        file.write('{"step": 3, "lo')
    resumed = start(made, resume=True)
    assert [line.step for line in read_lines(resumed.folder)] == [1, 2]


def test_memory_that_runs_out_costs_a_line_in_the_log_and_no_result(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    # epsilon: Adam divides a gradient that is 0 but for rounding by itself, and steps a whole way
    made = make_recipe(
        train={"steps": 3, "epsilon": 1e-4}, memory={"token_budget": 64, "keep_graphs": "off"}
    )
    whole = start(made)
    whole.train()
    wanted = load_file(whole.folder.adapter / "adapter_model.safetensors")
    observer = Silent()
    trainer = start(made, observer, overwrite=True)
    encode = type(trainer.job.encoder).__call__
    failed = []

    def once_without_memory(self: Any, *inputs: Any, **options: Any) -> Any:
        if not failed and trainer.step_index == 1 and torch.is_grad_enabled():
            failed.append(inputs[0].ids_BT.numel())
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, *inputs, **options)

    monkeypatch.setattr(type(trainer.job.encoder), "__call__", once_without_memory)
    trainer.train()
    assert failed
    budgets = [line.backward_tokens for line in observer.lines]
    assert budgets == [64, failed[0] // 2, failed[0] // 2]
    assert sum("memory ran out" in said for said in observer.said) == 1
    got = load_file(trainer.folder.adapter / "adapter_model.safetensors")
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)


def test_other_rows_under_one_name_are_not_gone_on_with(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    source = {"data": {"sources": [{"path": str(rows)}]}, "eval": {"sets": []}}
    texts = sentences(3, 33)
    lines = [
        json.dumps({"anchor": texts[i], "positive": texts[i + 1]}) + "\n" for i in range(0, 32, 2)
    ]
    rows.write_text("".join(lines))
    trainer = start(make_recipe(train={"steps": 1}, **source))
    trainer.train()
    trainer.save()
    longer = make_recipe(train={"steps": 2, "schedule": "constant"}, **source)
    rows.write_text("".join([*lines[1:], lines[0]]))
    with pytest.raises(ValueError, match=r"rows.jsonl: the rows are others than .* began with"):
        start(longer, resume=True, new_rate=True)
    rows.write_text("".join(lines))
    assert start(longer, resume=True, new_rate=True).step_index == 1
