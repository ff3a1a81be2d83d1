"""The search for the demonstration under which a model embeds best.

demonstrations  reading candidates
search          scoring each candidate on development pairs
trials          the record of candidates tried
"""
