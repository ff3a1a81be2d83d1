"""The GPU check, from a checkout in which nothing is installed; gpu/check.py says what it does.

python bench/gpu_check.py --out auto --total-seconds 570
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT, ROOT / "kernels", ROOT / "tests" / "support")

if __name__ == "__main__":
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = dict.fromkeys(path for path in (*map(str, SOURCES), *given) if path)
    # in the environment, so that the processes that it starts have it too
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    os.execve(sys.executable, [sys.executable, "-m", "bench.gpu.check", *sys.argv[1:]], environment)
