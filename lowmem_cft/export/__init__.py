"""A run becomes a folder that SentenceTransformer(path) loads.

layout  the folder: adapter or merged weights, modules, tokenizer, record
card    its model card
"""
