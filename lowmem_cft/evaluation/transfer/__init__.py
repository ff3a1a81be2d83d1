"""SentEval's transfer tasks: a classifier on frozen vectors.

tasks          reading the data sets
folds          which sentences train, choose and test
senteval_adam  SentEval's own classifier
converged      logistic regression until it converges
score          one task scored
report         a model's scores as JSON and for people
"""
