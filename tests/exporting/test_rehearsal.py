"""The export is tried before the training, and leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowmem_cft.exporting import rehearsal
from lowmem_cft.exporting.layout import Kind, write_model
from lowmem_cft.inference.loading import Embedder
from lowmem_cft.training import pipeline
from lowmem_cft.training.job import assemble
from running import MakeRecipe, Silent


@pytest.fixture
def embedder(make_recipe: MakeRecipe) -> Embedder:
    job = assemble(make_recipe(text={"template": "the {text} is"}), Silent())
    return Embedder(job.encoder, job.backbone, job.recipe)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_nothing_is_changed_and_nothing_left(
    embedder: Embedder, kind: Kind, tmp_path: Path
) -> None:
    model = embedder.encoder.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    observer = Silent()
    rehearsal.rehearse_export(embedder, tmp_path / "model", kind, observer)
    assert observer.said[0].startswith("trying the export before the training")
    assert observer.said[1].startswith("export checked")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), random_state)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_export_without_the_adapter_is_noticed(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrained adapter moves nothing, so that this would pass with it."""

    def write_without(embedder: Embedder, folder: Path, kind: Kind) -> None:
        parameters = [p for p in embedder.encoder.model.parameters() if p.requires_grad]
        weights = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.data.zero_()
        write_model(embedder, folder, kind)
        for parameter, values in zip(parameters, weights, strict=True):
            parameter.data.copy_(values)

    monkeypatch.setattr(rehearsal, "write_model", write_without)
    with pytest.raises(RuntimeError, match="does not embed as the trained one"):
        rehearsal.rehearse_export(embedder, tmp_path / "model", "adapter", Silent())
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_is_not_finite_is_said(embedder: Embedder, tmp_path: Path) -> None:
    table = embedder.encoder.model.get_base_model().get_input_embeddings()
    table.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="embeddings are not finite in float32; take a wider one"):
        rehearsal.rehearse_export(embedder, tmp_path / "model", "adapter", Silent())


def test_a_finished_run_that_is_resumed_is_not_tried_again(make_recipe: MakeRecipe) -> None:
    made = make_recipe(train={"steps": 1}, eval={"sets": []})
    said = []
    for resume in (False, True):
        observer = Silent()
        pipeline.run_recipe(made, observer, resume=resume)
        said.append([line for line in observer.said if line.startswith("trying the export")])
    assert [len(lines) for lines in said] == [1, 0]
