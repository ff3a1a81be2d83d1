"""What a step will take, and the fastest plan that fits.

limits       how many bytes a run may take
live_bytes   bytes of tensors alive
tracing      the cost of a chunk, traced without weights
footprint    bytes of weights, adapter and optimizer
prediction   peak memory and cost of a step under a plan
choice       the fastest plan that fits
recipe_plan  the plan of a recipe, for people and as JSON
"""
