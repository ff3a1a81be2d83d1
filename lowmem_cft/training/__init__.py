"""The loop, its checkpoints, and a run as one call.

names       whether what a recipe names can be there
job         a recipe put together: data, plan, model, optimizer
trainer     the steps of a job, saved on the way, and its end
scoring     the run's own scores, and the best adapter
optimizer   AdamW and learning rates
runs        a run's folder: made, continued, replaced
health      whether steps still teach
records     what a run writes of itself: log lines, progress, metrics
checkpoint  all that going on needs
interrupt   stopping at the end of a step
card        the model card
pipeline    train, score, export, check
demo        the demo
"""
