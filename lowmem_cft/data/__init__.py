"""Files become checked rows, rows become tokens, and a step's texts are cut into chunks.

formats   files and hub names -> records
columns   which column plays which role
cells     what stands for a text in a cell: passages, instructions, messages
rows      records -> checked training rows
tokens    templates, tokenising, truncation
corpus    rows -> distinct texts and indices
batches   the order of rows, and the texts of a step
chunks    texts cut into chunks by token budget, and padded
embedded/ the small data that the package brings along
"""
