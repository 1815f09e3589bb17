"""Case `heads`: what a head for retrieval alone should be. Variants of its shape and training on
one model, on the same batches.
"""
