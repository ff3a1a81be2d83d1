"""Our loss inside other libraries' trainers; each module needs its library.

sentence_transformers  losses for SentenceTransformerTrainer
"""
