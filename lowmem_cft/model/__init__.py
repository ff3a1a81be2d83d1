"""A checkpoint's name becomes a frozen backbone with an adapter that embeds texts.

sources     where a checkpoint and its tokenizer come from
configs     shapes of known models without their checkpoints
minicpm     MiniCPM checkpoints as transformers reads them
backbone    loading, precision, the adapter and its targets
attention   which kernel computes attention, and what it holds
lora        a LoRA layer that keeps no dropped inputs
dropout     dropout by a text's identity
last_layer  the last layer, computed only where it is read
prefix      tokens shared by all texts, computed once
encoder     chunks -> pooled embeddings
"""
