"""Measurements beside a peer; run them from the project's folder, as README.md here says.

harness          turns, fresh processes, the machine's facts, the line of JSON
device           time, memory and speed of work on a device
peers            our base model and adapter in sentence-transformers
loss/            the loss by us and by others
step/            a step's gradient beside sentence-transformers' cached loss and the plain step
train            this trainer beside sentence-transformers' on the same work
st_losses        our losses for sentence-transformers' trainer beside those they stand in for
encode           embedding the STS sets beside sentence-transformers
dropout          dropout by identity beside torch's
embedding_dtype  what the dtype of embeddings costs the loss's gradient
gpu/             all that a CUDA GPU is needed for
gpu_check        runs gpu/ where nothing is installed
"""
