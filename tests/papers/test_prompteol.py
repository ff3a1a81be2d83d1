"""The run of the second paper, whole."""

from __future__ import annotations

from lowmem_cft.papers.request import PAPERS
from reproducing import Ask, records_of
from running import Heard


def test_the_second_paper_whole(ask: Ask) -> None:
    run = ask("prompteol", transfer_rows=30)
    run.run(Heard())
    records = records_of(run)
    assert list(PAPERS["prompteol"].stages) == [stage.name for stage in run.stages]
    assert set(records) == {
        *("base", "icl-search", "evaluate-icl", "data", "train", "evaluate"),
        *("transfer-base", "transfer-trained"),
    }
    search = records["icl-search"]["result"]
    assert len(search["trials"]) == 3
    scores = [trial["spearman"] for trial in search["trials"]]
    assert scores == sorted(scores, reverse=True)
    assert records["evaluate-icl"]["inputs"]["text"]["template"] == search["best_template"]
    if search["trials"][0]["sentence"] is not None:
        assert search["best_template"] != search["template"]
    assert records["base"]["inputs"]["clean_up"] is True
    tasks = records["transfer-base"]["result"]["tasks"]
    assert [(task["name"], task["num_rows"]["train"]) for task in tasks] == [
        ("MRPC", 30),
        ("SST2", 30),
    ]
    assert "adapter_sha256" in records["transfer-trained"]["inputs"]
