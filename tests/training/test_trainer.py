"""The whole line on a tiny model: train, stop, go on, export, load again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lowmem_cft.evaluation.sts import score as evaluate
from lowmem_cft.exporting.check import MIN_COSINE
from lowmem_cft.gradient import step
from lowmem_cft.inference.embed import embed_texts
from lowmem_cft.inference.loading import load_model
from lowmem_cft.recipe import schema as recipe
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.training import interrupt, pipeline
from lowmem_cft.training import runs as run
from lowmem_cft.training import trainer as train
from lowmem_cft.training.checkpoint import load_state
from lowmem_cft.training.records import StepLine, read_lines
from lowmem_cft_kernels import GTE, FalseNegatives, LearnedTemperature, LossOptions, info_nce
from lowmem_cft_kernels.reference import reference_loss
from running import MakeRecipe, Silent, sentences

CPU = torch.device("cpu")


def start(made: recipe.Recipe, observer: Silent | None = None, **options: bool) -> train.Trainer:
    folder = run.open_run(
        made, resume=options.get("resume", False), overwrite=options.get("overwrite", False)
    )
    resume = options.get("resume", False)
    return train.Trainer(made, folder, observer or Silent(), resume=resume)


def strip_times(lines: list[StepLine]) -> list[dict[str, Any]]:
    timed = ("_per_s", "step_ms", "peak_bytes")
    return [{k: v for k, v in line.to_json().items() if not k.endswith(timed)} for line in lines]


def test_loss_falls_and_all_files_are_there(make_recipe: MakeRecipe) -> None:
    observer = Silent()
    made = make_recipe(train={"steps": 30}, lora={"dropout": 0.0})
    folder, metrics = pipeline.run_recipe(made, observer)
    assert observer.lines[-1].loss < 0.5 * observer.lines[0].loss
    assert [line.step for line in read_lines(folder)] == list(range(1, 31))
    assert metrics.export.checked is True
    assert metrics.export.min_cosine >= MIN_COSINE["adapter"]
    assert metrics.to_json() == json.loads(folder.metrics.read_text())
    for path in ("recipe.yaml", "README.md", "adapter/adapter_model.safetensors"):
        assert (folder.path / path).is_file(), path
    for path in ("modules.json", "README.md", "tokenizer.json", "lowmem_cft.json"):
        assert (folder.model / path).is_file(), path
    assert load_recipe(str(folder.recipe)) == made


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
        assert trainer.temperature is not None
        assert resumed.temperature is not None
        assert torch.equal(resumed.temperature.raw, trainer.temperature.raw)
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
    assert trainer.temperature is not None
    wanted = LearnedTemperature(0.05, 0.005, 1.0)
    assert torch.equal(trainer.temperature.raw.cpu(), wanted.raw)
    trainer.step()
    reference_loss(*given[0], LossOptions(temperature=wanted()))[0].backward()
    assert wanted.raw.grad is not None
    assert abs(float(wanted.raw.grad)) > 1e-3
    moved = trainer.temperature.raw.detach().cpu() - wanted.raw.detach()
    assert float(moved) == pytest.approx(-0.01 * float(wanted.raw.grad.sign()), rel=1e-3)


def test_a_temperature_is_trained_without_decay_or_not_at_all(make_recipe: MakeRecipe) -> None:
    learned = make_recipe(train={"weight_decay": 0.3}, loss={"learn_temperature": True})
    trainer = start(learned)
    assert trainer.temperature is not None
    adapter, temperature = trainer.optimizer.param_groups
    assert (adapter["weight_decay"], temperature["weight_decay"]) == (0.3, 0.0)
    assert adapter["lr"] == temperature["lr"]
    assert [id(p) for p in temperature["params"]] == [id(trainer.temperature.raw)]
    assert [id(p) for p in adapter["params"]] == [id(p) for p in trainer.parameters]

    plain = start(make_recipe(train={"weight_decay": 0.3}), overwrite=True)
    assert plain.temperature is None
    assert len(plain.optimizer.param_groups) == 1
    assert "temperature" not in plain.step()
    plain.save()
    assert load_state(plain.folder).temperature == {}


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
    assert "attention by: cpu" in observer.said
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


def test_resume_refuses_another_recipe(make_recipe: MakeRecipe) -> None:
    start(make_recipe(train={"steps": 2})).train()
    with pytest.raises(ValueError, match=r"train.learning_rate was 0.01 .* is 0.5 now"):
        start(make_recipe(train={"steps": 2, "learning_rate": 0.5}), resume=True)
    start(make_recipe(train={"steps": 2}, memory={"token_budget": 32}), resume=True)


def test_existing_run_is_refused(make_recipe: MakeRecipe) -> None:
    made = make_recipe(train={"steps": 1})
    start(made).train()
    with pytest.raises(ValueError, match=r"exists: go on with `resume`, replace .*`overwrite`"):
        start(made)


def test_overwrite_spares_a_folder_that_is_no_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    made = make_recipe()
    precious = tmp_path / "runs" / "tiny" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    with pytest.raises(ValueError, match="no run of ours"):
        start(made, overwrite=True)
    assert precious.read_text() == "years of work"


def test_nothing_to_resume(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValueError, match="no checkpoint to resume"):
        start(make_recipe(), resume=True)


def test_failed_save_keeps_the_last_checkpoint(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = start(make_recipe())
    trainer.step()
    trainer.save()
    trainer.step()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match=r"No space left.*the checkpoint before it is kept"):
        trainer.save()
    monkeypatch.undo()
    assert load_state(trainer.folder).step == 1
    assert not list(trainer.folder.path.glob("*.partial"))


def test_damaged_checkpoint_is_noticed(make_recipe: MakeRecipe) -> None:
    trainer = start(make_recipe())
    trainer.step()
    trainer.save()
    file = trainer.folder.checkpoint / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"optimizer\.pt is damaged .* `overwrite`"):
        start(make_recipe(), resume=True)
    file.unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt is damaged"):
        start(make_recipe(), resume=True)
    for text in ("{", "[]", '{"step": 1}'):
        (trainer.folder.checkpoint / "state.json").write_text(text)
        with pytest.raises(ValueError, match=r"state\.json: .*; start anew with `overwrite`"):
            start(make_recipe(), resume=True)
    trainer.folder.recipe.write_text("model: [")
    with pytest.raises(ValueError, match=r"recipe\.yaml: not readable as YAML"):
        start(make_recipe(), resume=True)


def test_best_adapter_is_kept(make_recipe: MakeRecipe) -> None:
    made = make_recipe(
        train={"steps": 8, "learning_rate": 0.1}, eval={"every": 2, "keep_best": True}
    )
    folder, metrics = pipeline.run_recipe(made, Silent())
    scored = {line.step: line.spearman for line in read_lines(folder) if line.spearman is not None}
    assert list(scored) == [2, 4, 6, 8]
    assert len(set(scored.values())) > 1
    assert metrics.best_step == max(scored, key=lambda step: scored[step])
    assert metrics.after[0].spearman == pytest.approx(max(scored.values()), abs=1e-12)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_exports_embed_alike_however_loaded(
    make_recipe: MakeRecipe, kind: str, quantization: str
) -> None:
    made = make_recipe(
        model={"quantization": quantization, "keep_layers": 2},
        text={"template": "the man is {text} in two", "append_eos": False},
        embedding={"pooling": "last"},
        output={"export": kind},
    )
    folder, metrics = pipeline.run_recipe(made, Silent())
    assert metrics.export.checked is True
    texts = sentences(9, 12)
    vectors = []
    for name in (folder.path, folder.model):
        loaded = load_model(str(name), CPU, print)
        vectors.append(embed_texts(loaded.encoder, loaded.tokenizer, texts, loaded.text_format))
    cosine = (vectors[0] * vectors[1]).sum(axis=1)
    assert cosine.min() >= MIN_COSINE[kind]  # type: ignore[index]
    assert np.abs(vectors[0][0] - vectors[0][1]).max() > 1e-2, "all texts embed alike"


def test_export_check_fails_loudly(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layout that reads another token must not pass."""
    from lowmem_cft.exporting import layout as export

    monkeypatch.setitem(export._POOLING_KEYS, "eos", "pooling_mode_mean_tokens")
    with pytest.raises(RuntimeError, match=r"does not embed as the trained one: lowest cosine"):
        pipeline.run_recipe(make_recipe(), Silent())
    assert (Path(make_recipe().output.folder) / "tiny" / "adapter").is_dir()


def test_templates_by_role_become_prompts(make_recipe: MakeRecipe) -> None:
    text = {"template": "the man : {text}", "document_template": "the cat {text}"}
    folder, metrics = pipeline.run_recipe(make_recipe(text=text), Silent())
    assert metrics.export.checked is True
    layout = json.loads((folder.model / "config_sentence_transformers.json").read_text())
    assert layout["prompts"] == {"query": "the man : ", "document": "the cat "}


def test_templates_that_prompts_cannot_say(make_recipe: MakeRecipe) -> None:
    text = {"template": "{text} is", "document_template": "{text} was"}
    with pytest.raises(ValueError, match=r"document_template: .*output.export: none"):
        pipeline.run_recipe(make_recipe(text=text), Silent())


def test_mistakes_leave_no_folder(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for sections in (
        {"data": {"sources": [{"path": str(tmp_path / "missing.jsonl")}]}},
        {"train": {"logical_batch": 41}},
        {"model": {"id": "./nowhere"}},
        {"lora": {"targets": ["no_such_layer"]}},
        {"train": {"optimizer": "paged_adamw_8bit"}},
        {"eval": {"sets": ["STS99"]}},
    ):
        with pytest.raises(ValueError, match=r"\w"):
            pipeline.run_recipe(make_recipe(**sections), Silent())
        assert not (tmp_path / "runs" / "tiny").exists(), sections


def test_not_a_number_stops_with_the_checkpoint_kept(make_recipe: MakeRecipe) -> None:
    trainer = start(make_recipe())
    trainer.step()
    trainer.save()
    for parameter in trainer.parameters:
        parameter.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"loss of step 2 is nan; lower train.learning_rate"):
        trainer.step()
    assert load_state(trainer.folder).step == 1


def test_a_score_that_cannot_be_computed_loses_no_step(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_recipe(train={"steps": 4}, eval={"every": 2})
    trainer, real = start(made), evaluate.embed_texts

    def overflows(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **kwargs) * (np.nan if trainer.step_index == 2 else 1)

    with monkeypatch.context() as broken:
        broken.setattr(evaluate, "embed_texts", overflows)
        with pytest.raises(ValueError, match="embeddings are not finite"):
            trainer.train()
    assert [line.step for line in read_lines(trainer.folder)] == [1, 2]
    resumed = start(made, resume=True)
    assert resumed.step_index == 2
    resumed.train()
    assert [line.step for line in read_lines(trainer.folder)] == [1, 2, 3, 4]


def test_overwrite_with_a_mistake_keeps_the_old_run(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder, _ = pipeline.run_recipe(make_recipe(train={"steps": 1}), Silent())
    before = folder.metrics.read_text()
    wrong = make_recipe(data={"sources": [{"path": str(tmp_path / "gone.jsonl")}]})
    with pytest.raises(ValueError, match=r"gone.jsonl"):
        pipeline.run_recipe(wrong, Silent(), overwrite=True)
    assert folder.metrics.read_text() == before
    pipeline.run_recipe(make_recipe(train={"steps": 1}), Silent(), overwrite=True)
    assert [entry.name for entry in folder.path.parent.iterdir()] == ["tiny"]


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


def test_resume_may_evaluate_other_sets(make_recipe: MakeRecipe) -> None:
    """Scores from before training are of the base, also for a set that is added later."""
    none = make_recipe(train={"steps": 3}, eval={"sets": []})
    pipeline.run_recipe(none, Silent())
    wanted, _ = pipeline.run_recipe(
        make_recipe(train={"steps": 3}, output={"name": "other"}), Silent()
    )
    _, metrics = pipeline.run_recipe(make_recipe(train={"steps": 3}), Silent(), resume=True)
    other = json.loads(wanted.metrics.read_text())
    assert metrics.to_json()["before"] == other["before"]
    assert metrics.to_json()["after"] == other["after"]
    assert metrics.before != metrics.after


def test_long_texts_do_not_fail_the_check_of_a_template_with_a_tail(
    make_recipe: MakeRecipe,
) -> None:
    made = make_recipe(
        text={"template": "the man is {text} in two", "append_eos": False, "max_tokens": 5},
        embedding={"pooling": "last"},
    )
    _, metrics = pipeline.run_recipe(made, Silent())
    assert metrics.export.checked is True


def test_mistakes_of_the_layout_are_found_before_training(make_recipe: MakeRecipe) -> None:
    observer = Silent()
    text = {"template": "{text} is", "document_template": "{text} was"}
    with pytest.raises(ValueError, match=r"document_template"):
        pipeline.run_recipe(make_recipe(text=text), observer)
    assert not observer.said


def test_base_is_named_by_its_whole_path(
    make_recipe: MakeRecipe, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export must load from another working folder."""
    monkeypatch.chdir(tiny_folder.parent)
    folder, _ = pipeline.run_recipe(
        make_recipe(model={"id": f"./{tiny_folder.name}"}, train={"steps": 1}), Silent()
    )
    config = json.loads((folder.model / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_folder)


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
    encode = type(trainer.encoder).__call__
    failed = []

    def once_without_memory(self: Any, *inputs: Any, **options: Any) -> Any:
        if not failed and trainer.step_index == 1 and torch.is_grad_enabled():
            failed.append(inputs[0].ids_BT.numel())
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, *inputs, **options)

    monkeypatch.setattr(type(trainer.encoder), "__call__", once_without_memory)
    trainer.train()
    assert failed
    budgets = [line.backward_tokens for line in observer.lines]
    assert budgets == [64, failed[0] // 2, failed[0] // 2]
    assert sum("memory ran out" in said for said in observer.said) == 1
    got = load_file(trainer.folder.adapter / "adapter_model.safetensors")
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)


def test_a_text_that_never_fits_stops_before_weights_are_loaded(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load_backbone", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match=r"texts of up to \d+ tokens.*what helps"):
        start(make_recipe(memory={"limit": "750MiB"}))


def test_padding_and_plan_are_in_log_and_report(make_recipe: MakeRecipe) -> None:
    observer = Silent()
    _, metrics = pipeline.run_recipe(make_recipe(train={"steps": 2}), observer)
    assert metrics.plan.backward_tokens == 64
    assert metrics.plan.kept_tokens is None, "a tiny model's graphs fit"
    shares = [line.padding_share for line in observer.lines]
    assert min(shares) <= metrics.padding_share <= max(shares)
    assert 0 <= max(shares) < 0.5
