"""The loss at ragged sizes with poison around its inputs and outputs; compute-sanitizer runs it.

    compute-sanitizer --tool memcheck python -m bench.gpu.sanitized

It fails by itself too where what lies around the inputs shows in a result, or around the gradients
something was written.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from bench.gpu.loss_cases import OPTION_SETS, make_case
from lowmem_cft_kernels import choose_path

SHAPE = (37, 53, 40)
AROUND = 8


def surrounded(x_RD: Tensor, values: float = torch.nan) -> Tensor:
    """The same numbers amid others, rows apart."""
    rows, width = x_RD.shape
    whole = x_RD.new_full((rows + 2 * AROUND, width + 2 * AROUND), values)
    whole[AROUND:-AROUND, AROUND:-AROUND] = x_RD
    return whole[AROUND:-AROUND, AROUND:-AROUND]


def untouched(x_RD: Tensor) -> bool:
    """What `surrounded` put around is there still."""
    assert x_RD._base is not None
    whole = x_RD._base.clone()
    whole[AROUND:-AROUND, AROUND:-AROUND] = torch.nan
    return bool(whole.isnan().all())


def check(words: frozenset[str], dtype: torch.dtype, device: torch.device) -> None:
    """Raise AssertionError where surroundings matter."""
    case = make_case(words, SHAPE).to(dtype, device)
    path = choose_path(case.query_MD, case.doc_ND)
    plain = case.run(path)
    amid = replace(case, query_MD=surrounded(case.query_MD), doc_ND=surrounded(case.doc_ND))
    out = (
        surrounded(torch.zeros_like(plain.d_query_MD)),
        surrounded(torch.zeros_like(plain.d_doc_ND)),
    )
    result = amid.run(path, out=out)
    for grad, plain_grad in zip(out, (plain.d_query_MD, plain.d_doc_ND), strict=True):
        assert untouched(grad), "something was written around a gradient"
        # another layout may take another product of cuBLAS, which adds in another order
        error = float((grad - plain_grad).norm() / plain_grad.norm())
        assert error < 1e-5, f"the surroundings change a gradient by {error:.1e}"
    assert bool(result.loss.isfinite())


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = ("plain", "symmetric keys weights", "gte positives ignored", list(OPTION_SETS)[-1])
    for name in names:
        for dtype in (torch.float32, torch.float16):
            check(OPTION_SETS[name], dtype, device)
    print(f"{len(names)} option sets on {device}: nothing beyond the bounds", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
