"""Contrastive losses over M queries and N documents, as value and gradient in one call.

`info_nce` picks a path; `reference` is the specification every path is tested against. This
package needs torch and nothing else, and knows neither models nor trainers.
"""

from lowmem_cft_kernels.info_nce import InfoNCEResult, Path, info_nce
from lowmem_cft_kernels.masks import Candidates

__all__ = ["Candidates", "InfoNCEResult", "Path", "info_nce"]
