"""Vectors become scores with intervals.

suites    what `eval` runs: sts, transfer
sts/      semantic similarity
transfer/ classification on frozen vectors
search/   the search for a demonstration
clean_up  normalising text as published protocols do
"""
