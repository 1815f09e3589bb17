"""Case `accuracy`: what a model still answers when each decode step reads only what a retriever
chose.
"""
