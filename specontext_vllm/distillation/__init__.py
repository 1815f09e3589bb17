"""Training a retrieval head for a model: teacher, draft model, losses, data and loop; transformers
and accelerate, no vLLM.
"""
