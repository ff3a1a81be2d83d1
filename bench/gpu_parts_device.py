"""The GPU check's parts that are about the device and about dropout's speed."""

from __future__ import annotations

from typing import Any

import torch

from gpu_options import Options, matrix_peak, say, seconds_of
from measure import median, versions


def check_device(options: Options) -> dict[str, Any]:
    """What the device gives at best."""
    numel = 2**30 if options.cuda and not options.tiny else 2**22
    source, target = (torch.zeros(numel, dtype=torch.uint8, device=options.device) for _ in "ab")
    copy_s = seconds_of(lambda: target.copy_(source), 10, options.device)
    found: dict[str, Any] = {
        "matrix_tflops": round(matrix_peak(options) / 1e12, 3),
        "copy_gbps": round(2 * numel / copy_s / 1e9, 1),
    }
    if options.cuda:
        properties = torch.cuda.get_device_properties(options.device)
        found["total_bytes"] = properties.total_memory
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["triton"] = versions(("triton",)).get("triton")
    return found


def check_dropout_speed(options: Options) -> dict[str, Any]:
    """bench/dropout.py's comparison, in short rounds."""
    import dropout

    rows: list[dict[str, Any]] = []
    for dtype in dropout.DTYPES:
        for shape in dropout.SHAPES[:1] if options.tiny else dropout.SHAPES:
            sides = dropout.make_sides(shape, dtype, 0.1, options.device)
            rounds, budget = (3, 0.01) if options.tiny else (5, 0.05)
            row = dropout.compare(sides, rounds, budget, options.device)
            rows.append({"shape": list(shape), "dtype": str(dtype)[6:]} | row)
            say(f"  {rows[-1]}")
    return {
        "ok": True,
        "rows": rows,
        "ratio_median": round(median([row["ratio"] for row in rows]), 3),
        "ratio_worst": max(row["ratio"] for row in rows),
        "module_ratio_median": round(median([row["module_ratio"] for row in rows]), 3),
    }
