"""The retrieval head, scoring, selection and distillation; knows tensors, not vLLM."""
