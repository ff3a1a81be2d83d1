"""What the rows of a run say: each over its rounds, and by each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.harness import median

FACTORS = ("sorting", "deduplication", "lean_layers", "no_mask", "freed_memory")
"""What ours can be measured without."""

Row = dict[str, Any]


def summary(name: str, results: Sequence[Row], batch: int) -> Row:
    """One row over its rounds: medians of the rounds that measured it."""
    good = [result for result in results if "skipped" not in result]
    if not good:
        return {"row": name, "skipped": results[0]["skipped"], "triplets_per_s": None}
    seconds = [step_s for result in good for step_s in result["seconds"]]
    middle_s = median(seconds)
    return {
        "row": name,
        "skipped": None,
        "triplets_per_s": round(batch / middle_s, 3),
        "sequences_per_s": round(3 * batch / middle_s, 3),
        "step_s": round(middle_s, 4),
        "seconds": [round(step_s, 4) for step_s in seconds],
        "live_bytes": max(result["live_bytes"] for result in good),
        "rss_bytes": int(median([result["rss_bytes"] for result in good])),
        "base_bytes": int(median([result["base_bytes"] for result in good])),
        "loss": good[0]["loss"],
        **{key: good[0][key] for key in ("texts", "padded_tokens", "how", "plan")},
    }


def ratio(rows: dict[str, Row], over: str | None, under: str | None, key: str) -> float | None:
    """One row's figure by another's; None where there is not both."""
    above, below = (rows.get(name or "", {}).get(key) for name in (over, under))
    return round(above / below, 3) if above and below else None


def headline(rows: dict[str, Row]) -> dict[str, Any]:
    """The figures on top of the JSON line; __main__.py says what they are."""
    good = {name: row for name, row in rows.items() if row.get("comparable") and "-" not in name}
    ours = [name for name in good if name.startswith("ours_")]
    st = fastest(good, [name for name in good if name.startswith("st_")])
    live = good[st]["live_bytes"] if st else 0
    equal, half = (
        fastest(good, [name for name in ours if good[name]["live_bytes"] <= share * live])
        for share in (1, 0.5)
    )
    as_fast = [name for name in ours if st and good[name]["step_s"] <= good[st]["step_s"]]
    lean = min(as_fast, key=lambda name: int(good[name]["live_bytes"]), default=None)
    return {
        "speedup_at_equal_memory": ratio(good, equal, st, "triplets_per_s"),
        "speedup_at_half_memory": ratio(good, half, st, "triplets_per_s"),
        "speedup_free_memory": ratio(good, "ours_kept_all", st, "triplets_per_s"),
        "speedup_planner": ratio(good, "ours_planner", st, "triplets_per_s"),
        "memory_ratio_at_equal_speed": ratio(good, lean, st, "live_bytes"),
        "rss_ratio_at_equal_speed": ratio(good, lean, st, "rss_bytes"),
        "rss_ratio_at_equal_memory": ratio(good, equal, st, "rss_bytes"),
        "kept_all_cost": ratio(good, "ours_kept_all", "plain_chunks", "step_s"),
        "kept_none_cost": ratio(good, "ours_kept_none", "plain_chunks", "step_s"),
        "st_best": st,
        "ours_equal_memory": equal,
        "ours_half_memory": half,
        "ours_equal_speed": lean,
    }


def fastest(rows: dict[str, Row], names: Sequence[str]) -> str | None:
    return min(names, key=lambda name: float(rows[name]["step_s"]), default=None)


def switch_offs(rows: dict[str, Row], losses: Sequence[Row], st: str | None) -> dict[str, Any]:
    """What each factor is worth: the row without it by the row with it."""
    pairs = {factor: (f"ours_kept_none-{factor}", "ours_kept_none") for factor in FACTORS}
    pairs["kept_graphs"] = ("ours_kept_none", "ours_kept_all")
    pairs["st_freed_memory"] = (f"{st}-freed_memory", str(st))
    worth: dict[str, Any] = {
        name: {key: ratio(rows, *pair, key) for key in ("step_s", "live_bytes")}
        for name, pair in pairs.items()
    }
    if losses and "ms" in losses[0]:
        ms = {side: median([row["ms"][side] for row in losses]) for side in losses[0]["ms"]}
        worth["loss"] = {
            "ms": ms,
            "st_by_ours": round(ms["st"] / ms["ours"], 3),
            **{key: losses[0][key] for key in ("live_bytes", "losses")},
        }
    return worth
