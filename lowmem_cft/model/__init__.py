"""A checkpoint's name becomes a frozen backbone with an adapter that embeds texts.

names       whether a model can be there at all
sources     where a checkpoint and its tokenizer come from
configs     shapes of known models without their checkpoints
bounds      token ids and positions that a model has
quantized   how a checkpoint's weights are held already
trainable   which models train exactly here
minicpm     MiniCPM checkpoints as transformers reads them
backbone    the frozen model and its tokenizer, loaded
exported    an export of ours as a base
precision   the model in another precision for a while
adapter     the LoRA adapter: where it sits, what is trained
patches     what stands in other libraries' layers, and the way back
lora        a LoRA layer that keeps no dropped inputs
dropout     dropout by a text's identity
attention   which kernel computes attention, and what it holds
causality   whether tokens see those behind them
last_layer  the last layer, computed only where it is read
prefix      tokens shared by all texts, computed once
encoder     chunks -> pooled embeddings
identity    what tells one loaded model from another
"""
