"""A model in use: a name becomes an encoder, texts become vectors.

loading         runs, exports and checkpoints -> an encoder with its settings
embedder        what is loaded, ready to embed
embed           texts -> vectors, sorted by length
prefix_sharing  whether a shared prefix is worth computing once
kept_vectors    vectors kept on disk between commands
"""
