"""All that a CUDA GPU is needed for; `python bench/gpu_check.py` runs it.

check         runs the parts, each in a process and a time budget of its own
options       what a part is given
checks        checks that are counted
parts/        one file for each part
facts         the card and its software
ballast       a process that makes a card small
nf4           4-bit layers
real_models   models of real size with random weights
small_models  small models and their gradients
steps         steps of real models: what they take beside what was predicted
phases        a step's phases, or a sample of its chunks
kernel_times  which kernels a piece of work spends its time in
loss_cases    sets of options of the loss
sanitized     the loss amid poison, which compute-sanitizer runs
"""
