"""How much the Triton path launches: at small sizes, a launch takes the GPU less than the host.

Tensors of the meta device stand for a GPU's; the kernels are recorded.
"""

from __future__ import annotations

import pytest
import torch

from launches import Operations, recorded
from lowmem_cft_kernels import GTE, ONE_WAY, SYMMETRIC, Candidates, LossPath, Softmax, info_nce

SOFTMAXES: dict[str, tuple[Softmax, ...]] = {
    "one way": ONE_WAY,
    "symmetric": SYMMETRIC,
    "gte": GTE,
}
Size = tuple[int, int, int]

# all launches, those of torch and of the kernels, in float32 and in bfloat16
MOST: dict[tuple[str, Size], tuple[int, int]] = {
    ("one way", (1024, 1024, 384)): (78, 79),
    ("one way", (4096, 8192, 768)): (99, 98),
    ("one way", (16384, 32768, 384)): (319, 234),
    ("symmetric", (1024, 1024, 384)): (119, 120),
    ("symmetric", (4096, 8192, 768)): (145, 143),
    ("symmetric", (16384, 32768, 384)): (365, 264),
    ("gte", (1024, 1024, 384)): (163, 164),
    ("gte", (4096, 8192, 768)): (260, 199),
    ("gte", (16384, 32768, 384)): (924, 563),
}


@pytest.mark.parametrize(("name", "size"), MOST, ids=str)
def test_launches_of_a_call(name: str, size: Size) -> None:
    num_queries, num_docs, width = size
    for dtype, most in zip((torch.float32, torch.bfloat16), MOST[name, size], strict=True):
        query_MD = torch.empty(num_queries, width, dtype=dtype, device="meta")
        doc_ND = torch.empty(num_docs, width, dtype=dtype, device="meta")
        candidates = Candidates(target=torch.arange(num_queries))
        candidates.validate(num_queries, num_docs)
        with recorded() as kernels, Operations() as operations:
            info_nce(
                query_MD,
                doc_ND,
                candidates.to(query_MD.device),
                temperature=0.05,
                softmaxes=SOFTMAXES[name],
                path=LossPath.TRITON,
            )
        count = operations.count + sum(kernel.count for kernel in kernels.values())
        assert most / 2 < count <= most, f"{count} in {dtype}"
