"""A checkpoint is whole, or noticed not to be."""

from __future__ import annotations

import json

import pytest
import torch

from lowmem_cft.training.checkpoint import adapter_state, load_state
from running import MakeRecipe, start


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
    with pytest.raises(RuntimeError, match=r"No space left.*the last checkpoint is kept"):
        trainer.save()
    monkeypatch.undo()
    assert load_state(trainer.folder).step == 1
    assert not list(trainer.folder.path.glob("*.partial"))


def test_damaged_checkpoint_is_noticed(make_recipe: MakeRecipe) -> None:
    trainer = start(make_recipe())
    trainer.step()
    trainer.save()
    record = json.loads((trainer.folder.checkpoint / "state.json").read_text())
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
    (trainer.folder.checkpoint / "state.json").write_text(json.dumps(record | {"step": "three"}))
    with pytest.raises(ValueError, match=r"state\.json is damaged \(step: .*; start anew with"):
        start(make_recipe(), resume=True)
    trainer.folder.recipe.write_text("model: [")
    with pytest.raises(ValueError, match=r"recipe\.yaml: not readable as YAML"):
        start(make_recipe(), resume=True)


def test_a_checkpoint_is_read_as_it_was_written(make_recipe: MakeRecipe) -> None:
    trainer = start(make_recipe(loss={"learn_temperature": True}))
    trainer.step()
    trainer.scoring.score_base()
    trainer.save()
    state = load_state(trainer.folder)
    assert state.step == 1
    assert state.plan == trainer.plan
    assert state.progress == trainer.progress
    assert state.progress.tokens > 0
    assert state.progress.before
    assert state.temperature.keys() == {"raw"}
    written = adapter_state(trainer.job.encoder.model)
    assert state.adapter.keys() == written.keys()
    assert all(torch.equal(state.adapter[name], tensor) for name, tensor in written.items())
