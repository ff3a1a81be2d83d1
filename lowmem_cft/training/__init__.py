"""The loop, its checkpoints, and a run as one call.

trainer     one run: assembling, stepping, saving, finishing
optimizer   AdamW and learning rates
runs        a run's folder: made, continued, replaced
records     what a run writes of itself: log lines and metrics
checkpoint  all that going on needs
interrupt   stopping at the end of a step
card        the model card
pipeline    train, score, export, check
demo        the demo
"""
