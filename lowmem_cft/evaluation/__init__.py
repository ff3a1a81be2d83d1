"""Vectors become scores with intervals.

suites    what a model is scored on: STS sets or transfer tasks
sts/      semantic similarity
transfer/ classification on frozen vectors
search/   the search for a demonstration
clean_up  normalising text as published protocols do
"""
