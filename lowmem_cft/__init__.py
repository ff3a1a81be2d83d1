"""lowmem-cft: contrastive fine-tuning of decoder language models on one small GPU.

Importing this package imports nothing heavy; the stages are its modules.
"""

__version__ = "0.1.0"
