"""A step's gradient beside sentence-transformers' cached loss; `python -m bench.step` compares them.

task     what all rows of a process share
ours     rows on our encoder
theirs   rows of sentence-transformers
measure  the measured processes
figures  what the rows say
"""
