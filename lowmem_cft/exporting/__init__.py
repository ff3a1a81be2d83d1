"""A run becomes a folder that SentenceTransformer(path) loads.

layout     the folder: adapter or merged weights, modules, tokenizer, record
tokenizer  a tokenizer that does by itself what the recipe says
merge      backbone and adapter as one model in 16 bits
check      whether an export embeds as its model
finished   an export, whole and checked, of a model or a finished run
rehearsal  the export tried before the training
"""
