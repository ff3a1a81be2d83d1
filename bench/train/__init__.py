"""This trainer beside sentence-transformers' on the same work; `python -m bench.train`.

compare  all runs of both sides
sides    the measured processes
"""
