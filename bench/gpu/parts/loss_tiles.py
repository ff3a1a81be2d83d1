"""Better tiles for this card than those that are shipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.gpu.options import Options
from bench.harness import say
from lowmem_cft_kernels import tune
from lowmem_cft_kernels.tiles import Tile, capability_of, room_bytes

TUNED = tuple(entry for entry in tune.ENTRIES if tune.bits_of(entry) == 16)
"""The entries for 16 bits."""


def check(options: Options) -> dict[str, Any]:
    """The best tiles found in the time beside those that are shipped; nothing is written."""
    if not options.cuda:
        return {"ok": True, "skipped": "tiles are timed on CUDA"}
    present = tune.present_tiles(capability_of(options.device), TUNED)
    best, trials = tune.tune(
        present,
        tune.SIZES,
        tune.CallTimer(options.device, present),
        room=room_bytes(options.device),
        seconds=max(1.0, options.left - 5),
        say=lambda line: say(f"  {line}"),
        keep=lambda best, trials: options.note(tiles_by_entry(present, best, trials)),
    )
    return tiles_by_entry(present, best, trials)


def tiles_by_entry(
    present: Mapping[str, Tile], best: Mapping[str, Tile], trials: Sequence[tune.Trial]
) -> dict[str, Any]:
    timed = [trial for trial in trials if trial.ms_by_size]
    return {
        "ok": bool(timed),
        "sizes": tune.SIZES,
        "entries": {
            entry: {
                "shipped": asdict(tile),
                "best": asdict(best[entry]),
                "faster_by": _gain([t for t in timed if t.entry == entry], tile),
            }
            for entry, tile in present.items()
        },
        "trials": [{**asdict(trial), "score": trial.score} for trial in timed],
        "left_out": [str(trial) for trial in trials if not trial.ms_by_size],
    }


def _gain(timed: list[tune.Trial], shipped: Tile) -> float | None:
    """The shipped tile's time by the best one's; None where it has none."""
    scores = {trial.tile: trial.score for trial in timed}
    return round(scores[shipped] / min(scores.values()), 4) if shipped in scores else None
