"""The exact gradient of a whole logical batch, chunk by chunk.

chunked          for a loop, a model and a loss of one's own
gradcache        both phases, for any `encode` and any `loss`
embedding_cache  embeddings and their gradients between the phases
oom              work that is halved where memory runs out
plan             the dials of a step that change time and memory alone
step             the contrastive step: encoder, loss and chunks together
"""

from lowmem_cft.gradient.chunked import ChunkedGradient, chunked_gradient

__all__ = ["ChunkedGradient", "chunked_gradient"]
