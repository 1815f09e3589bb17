"""The retrieval head, rules, scores and selection; knows tensors, not vLLM."""
