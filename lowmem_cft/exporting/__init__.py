"""A run becomes a folder that SentenceTransformer(path) loads.

layout     the folder: adapter or merged weights, modules, tokenizer, record
tokenizer  a tokenizer that does by itself what the recipe says
merge      backbone and adapter as one model in 16 bits
finished   the export of a finished run
check      whether an export embeds as its model
"""
