"""Where KV pages lie: frames on the GPU, the pinned host pool, hot buffers, and what moves between
them; no vLLM.
"""
