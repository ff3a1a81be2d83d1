"""The tile table and the tuner that writes one; what needs a GPU is replaced or interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from loss_cases import make_case, option_sets
from lowmem_cft_kernels import Candidates, LossOptions, Products, tiles, tune
from lowmem_cft_kernels.problem import Problem, make_problem
from lowmem_cft_kernels.tiles import LOADS, Tile, choose_tile, load_of, tile_for, write_table

SIZES = [(64, 128, 32), (64, 64, 64)]
ENTRY = "lse-16-plain"


def make(query_MD: torch.Tensor, options: LossOptions) -> Problem:
    candidates = Candidates(target=torch.arange(len(query_MD)))
    return make_problem(query_MD, query_MD.clone(), candidates, options)


class FakeTimer:
    """Times by tile; a tile that has none fails."""

    def __init__(self, times: dict[Tile, float], error: Exception) -> None:
        self.times, self.error = times, error
        self.asked: list[tuple[str, Tile, tune.Size]] = []

    def __call__(self, entry: str, tile: Tile, size: tune.Size) -> float:
        self.asked.append((entry, tile, size))
        if tile not in self.times:
            raise self.error
        return self.times[tile] * size[2]


def run(
    timer: tune.Timer, entries: Sequence[str] = (ENTRY,), room: int = 2**30, seconds: float = 100.0
) -> tuple[dict[str, Tile], list[tune.Trial], list[str]]:
    said: list[str] = []
    present = {entry: tune.CANDIDATES[entry.partition("-")[2]][0] for entry in entries}
    best, trials = tune.tune(present, SIZES, timer, room=room, seconds=seconds, say=said.append)
    return best, trials, said


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300000, 232448, "shared memory"),
        tune.WrongNumbers("loss is off"),
        RuntimeError("PassManager::run failed"),
    ],
)
def test_the_fastest_of_those_that_run_is_chosen(error: Exception) -> None:
    first, second, third, *others = tune.CANDIDATES["16-plain"]
    timer = FakeTimer(dict.fromkeys(others, 2.0) | {second: 0.5, third: 1.0}, error)
    best, trials, said = run(timer)
    assert best == {ENTRY: second}
    assert len(trials) == len({first, second, third, *others})
    (failed,) = [trial for trial in trials if not trial.ms_by_size]
    assert failed.tile == first
    assert type(error).__name__ in failed.note
    won = next(trial for trial in trials if trial.tile == second)
    assert won.ms_by_size == (16.0, 32.0)
    assert won.tflops == pytest.approx([6 * 64 * 128 * 32 / 16e9, 6 * 64 * 64 * 64 / 32e9])
    assert any("left out" in line for line in said)
    assert said[-1] == f"best: {won}"


def test_all_sizes_count() -> None:
    """1.1 and 1.1 is better than 1 and 2."""
    uneven, other, *_ = tune.CANDIDATES["16-plain"]
    times = {(uneven, SIZES[0]): 1.0, (uneven, SIZES[1]): 2.0, (other, SIZES[0]): 1.1}

    def timer(entry: str, tile: Tile, size: tune.Size) -> float:
        return times.get((tile, size), 1.1 if tile == other else 9.0)

    assert run(timer)[0] == {ENTRY: other}


def test_what_takes_too_much_shared_memory_is_not_started() -> None:
    timer = FakeTimer(dict.fromkeys(tune.CANDIDATES["16-plain"], 1.0), RuntimeError())
    room = 64 * 2**10
    best, trials, _ = run(timer, room=room)
    started = {tile for _, tile, _ in timer.asked}
    assert started == {tile for tile in started if tile.shared_bytes(16) <= room} != set()
    refused = [trial for trial in trials if "shared memory" in trial.note]
    assert len(refused) == len(trials) - len(started) > 0
    assert best[ENTRY] in started


@pytest.mark.parametrize("seconds", [0.0, 100.0])
def test_an_entry_without_a_winner_keeps_its_tile(seconds: float) -> None:
    timer = FakeTimer({}, tune.WrongNumbers("d_query_MD is off"))
    best, trials, _ = run(timer, tune.ENTRIES, seconds=seconds)
    assert best == {entry: tune.CANDIDATES[entry.partition("-")[2]][0] for entry in tune.ENTRIES}
    assert bool(trials) == (seconds > 0)


@pytest.mark.parametrize("kind", tune.NOT_REFUSALS)
def test_what_breaks_the_device_is_not_hidden(kind: type[Exception]) -> None:
    """What was found before it has been kept."""
    first, second, *_ = tune.CANDIDATES["16-plain"]
    timer = FakeTimer({first: 2.0, second: 1.0}, kind("an illegal memory access"))
    calls: list[tuple[dict[str, Tile], int]] = []
    with pytest.raises(kind, match="illegal memory access"):
        tune.tune(
            {ENTRY: first},
            SIZES,
            timer,
            room=2**30,
            seconds=100.0,
            say=lambda _: None,
            keep=lambda best, trials: calls.append((dict(best), len(trials))),
        )
    assert calls == [({ENTRY: first}, 1), ({ENTRY: second}, 2)]


def test_a_table_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tile_for(90, "lse", 16, "plain")
    second = next(tile for tile in tune.CANDIDATES["16-plain"] if tile != shipped)
    best, _, _ = run(FakeTimer({second: 1.0}, tune.WrongNumbers("off")), tune.ENTRIES[:2])
    path = tmp_path / "tiles.json"
    write_table(path, {90: best})
    monkeypatch.setenv("LOWMEM_CFT_TILES", str(path))
    assert tile_for(90, "lse", 16, "plain") == second
    newer, older = (tile_for(arch, "lse", 16, "plain") for arch in (100, 80))
    monkeypatch.delenv("LOWMEM_CFT_TILES")
    assert tile_for(90, "lse", 16, "plain") == shipped
    assert tile_for(100, "lse", 16, "plain") == newer, "other architectures keep their own"
    assert tile_for(80, "lse", 16, "plain") == older


def test_a_table_of_some_entries_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the table that is shipped does not know the architecture."""
    path, tile = tmp_path / "tiles.json", tune.CANDIDATES["16-plain"][4]
    write_table(path, {87: {ENTRY: tile}})
    wanted = tile_for(87, "gradient", 16, "plain")
    monkeypatch.setenv("LOWMEM_CFT_TILES", str(path))
    assert tile_for(87, "lse", 16, "plain") == tile
    assert tile_for(87, "gradient", 16, "plain") == wanted


def test_no_tiles_for_an_old_device() -> None:
    with pytest.raises(RuntimeError, match="compute capability 70, only from 75 on"):
        tile_for(70, "lse", 16, "plain")


def test_installed_restores_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = tune.CANDIDATES["16-plain"][3]
    monkeypatch.setenv("LOWMEM_CFT_TILES", "mine.json")
    with tune.installed({90: {ENTRY: tile}}):
        assert tile_for(90, "lse", 16, "plain") == tile
    assert os.environ["LOWMEM_CFT_TILES"] == "mine.json"
    monkeypatch.delenv("LOWMEM_CFT_TILES")
    with pytest.raises(ZeroDivisionError), tune.installed({90: {ENTRY: tile}}):
        raise ZeroDivisionError
    assert "LOWMEM_CFT_TILES" not in os.environ


class CudaLooking:
    """A tensor that says it is on a CUDA device."""

    device = torch.device("cuda", 0)

    def element_size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("room", "load"),
    [(232448, "plain"), (101376, "plain"), (81920, "middle"), (65536, "heavy")],
)
def test_a_tile_that_does_not_fit_the_card_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, room: int, load: str
) -> None:
    """128 x 128 x 64 in three stages of 16 bit are 96 KiB, 64 x 128 x 64 are 72."""
    block = make(torch.randn(8, 16), LossOptions(temperature=0.1)).blocks[0]
    looking: Any = replace(block, row_RD=CudaLooking())
    assert load_of(block) == "plain"
    large = Tile(block_r=128, block_c=128, block_d=64, num_warps=8, num_stages=3)
    by_load = {
        "plain": large,
        "middle": replace(large, block_r=64),
        "heavy": replace(large, block_r=64, block_c=64, block_d=32),
    }
    assert [by_load[name].shared_bytes(16) >> 10 for name in LOADS] == [96, 72, 24]
    properties = SimpleNamespace(shared_memory_per_block_optin=room)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with tune.installed({86: {f"lse-16-{name}": tile for name, tile in by_load.items()}}):
        assert choose_tile("lse", looking) == by_load[load]


def test_entries_are_those_that_calls_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry's call has that load, and the two kinds of call the two numbers of passes."""
    table = json.loads((Path(tiles.__file__).parent / "tiles.json").read_text(encoding="utf-8"))
    assert all(set(entries) == set(tune.ENTRIES) for entries in table.values())
    for entry in tune.ENTRIES:
        x_MD = torch.randn(8, 16)
        problem = make(x_MD, tune.options_for(entry, x_MD, x_MD.clone()))
        assert load_of(problem.blocks[0]) == entry.rpartition("-")[2]
        assert problem.documents_choose == entry.startswith("gradient")


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("plain", "plain"),
        ("two keys", "plain"),
        ("own negatives", "plain"),
        ("absolute margin", "middle"),
        ("all hardness", "middle"),
        ("several positives", "middle"),
        ("guides", "heavy"),
        ("several positives + guides", "heavy"),
    ],
)
def test_what_makes_a_block_heavy(name: str, load: str) -> None:
    case = make_case(option_sets()[name], (8, 12, 16), torch.float32)
    problem = make_problem(case.query_MD, case.doc_ND, case.candidates, LossOptions(**case.options))
    assert load_of(problem.blocks[0]) == load


def test_halves_take_half_the_depth_of_a_tile_of_16_bits() -> None:
    """And half its rows where a guide's halves are loaded as well."""
    x_MD = torch.randn(8, 16)
    for load in LOADS:
        (block, *_) = make(x_MD, tune.options_for(f"lse-32-{load}", x_MD, x_MD.clone())).blocks
        tile = tile_for(80, "lse", 16, load)
        rows = tile.block_r // 2 if load == "heavy" else tile.block_r
        wanted = replace(tile, block_r=rows, block_d=tile.block_d // 2)
        assert choose_tile("lse", block, Products.SPLIT_BF16) == wanted
        assert choose_tile("lse", block) == tile_for(80, "lse", 32, load)


def test_without_cuda_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "tiles.json"
    assert tune.main(["--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines() == ["tune: needs a CUDA device, and torch finds none here"]
    assert not out.exists()


@pytest.mark.parametrize("size", ["64x64", "0x4x4", "64x32x8", "axbxc"])
def test_sizes_that_are_none(size: str) -> None:
    with pytest.raises(SystemExit):
        tune.parse(["--sizes", size])


CHILD = """
import json, sys, time
import torch
from lowmem_cft_kernels import tune
from lowmem_cft_kernels.tiles import Tile

def elapsed_ms(work, device):
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)

tune.elapsed_ms, tune._RAGGED = elapsed_ms, (33, 49)
device, entries = torch.device("cpu"), sys.argv[1:]
present = tune.present_tiles(80, entries)
small = Tile(block_r=16, block_c=32, block_d=16, num_warps=4, num_stages=1)
tune.CANDIDATES = {load: (small,) for load in tune.CANDIDATES}
timer = tune.CallTimer(device, present, repeats=1)
_, trials = tune.tune(present, [(32, 48, 24)], timer, room=2**20, seconds=1e9, say=lambda _: None)
timer = tune.CallTimer(device, present, repeats=1)
tune.BOUNDS = {16: 0.0, 32: 0.0}
_, strict = tune.tune(present, [(32, 48, 24)], timer, room=2**20, seconds=1e9, say=lambda _: None)
print(json.dumps([[[t.entry, t.tile == small, len(t.ms_by_size), t.note] for t in found]
                  for found in (trials, strict)]))
"""


def test_calls_are_timed_and_their_numbers_looked_at() -> None:
    """In triton's interpreter: every entry takes the candidate; none is exact to the last bit."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, *tune.ENTRIES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    trials, strict = json.loads(done.stdout.splitlines()[-1])
    wanted = [[entry, small, 1, ""] for entry in tune.ENTRIES for small in (False, True)]
    assert trials == wanted
    assert len(strict) == len(wanted)
    assert all(note.startswith("WrongNumbers: d_query_MD") for *_, note in strict)
