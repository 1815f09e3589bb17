"""The retrieval head in a Ray actor, on another device than the model; knows Ray and tensors, not
vLLM (docs/guides/sidecar.md).
"""
