"""What a step will take, and the fastest plan that fits.

limits       how many bytes a step may take
live_bytes   bytes of tensors alive
tracing      the cost of a chunk, traced without weights
footprint    bytes of weights, adapter and optimizer
planner      the prediction of a step, and the choice among plans
recipe_plan  the plan of a recipe, for people and as JSON
"""
