"""Semantic textual similarity: data sets, correlations, reports, comparisons.

protocols     which sets a protocol has, and how they are averaged
sets          reading the data sets
correlation   Spearman and Pearson, and cosine similarity
bootstrap     intervals over pairs
score         one set scored
report        a model's scores as JSON and for people
compare       two reports, pair by pair
mteb_results  results in mteb's layout
"""
