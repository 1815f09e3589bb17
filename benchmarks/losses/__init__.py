"""Case `losses`: what a retrieval head should be trained on. Variants of the loss on one model,
same batches, same steps.
"""
