"""Case `marks`: what a selection of pages costs on real text, by who makes it: the model's own
attention, shared by more or fewer layers, or a retrieval head.
"""
