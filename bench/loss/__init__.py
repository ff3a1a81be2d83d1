"""The loss by us and by others; `python -m bench.loss` compares them.

cases   inputs, and the gradients that are exact
sides   implementations behind one interface
run     checks, times and compares them
report  the table and the picture
"""
